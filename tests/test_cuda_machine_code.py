"""What nvcc made of the CUDA kernels: registers, spills, and the instructions that make them fast. No GPU needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("pybind11")
from tests.cuda_emulation.build import HERE, ROOT, _setup

BUILD = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
LOCAL_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class Row:
    """Objects by name, what each of their kernels may use, and opcodes that each must and must not have.

    ``max_registers`` is what leaves room for the blocks that the kernel's launch bounds ask for; the machine code is
    looked at for ``arch``. Opcodes in ``needs`` are of the object, not of every kernel in it. Nothing may spill, on any
    architecture.
    """

    pattern: str
    arch: str
    max_registers: int
    needs: tuple[str, ...] = ()
    never: tuple[str, ...] = LOCAL_MEMORY


TENSOR_CORES = ("HMMA", "LDSM")
ROWS = (
    Row(r"cuda-(attention|sm90-dispatch|sm90-dispatch_fp8)", "80", 0),  # host code
    Row(r"cuda-simt-.*", "80", 255),
    Row(r"cuda-sm80-prepare-.*", "80", 128),
    # Tensors in any strides, masks, dropout: loads element by element.
    Row(r"cuda-sm80-(forward_general|(dkdv|dq)-.*-true).*", "80", 255, TENSOR_CORES),
    Row(r"cuda-sm80-(forward|dkdv|dq)-.*", "80", 255, (*TENSOR_CORES, "LDGSTS")),
    Row(r"cuda-sm90-decode-.*", "90a", 255, (*TENSOR_CORES, "UTMALDG", "SYNCS")),
    Row(r"cuda-sm90-forward_fp8-.*", "90a", 255, ("QGMMA", "UTMALDG", "USETMAXREG"), (*LOCAL_MEMORY, "HMMA", "HGMMA")),
    Row(
        r"cuda-sm90-.*(forward|backward|dkdv|dq).*",
        "90a",
        255,
        ("HGMMA", "UTMALDG", "USETMAXREG"),
        (*LOCAL_MEMORY, "HMMA"),
    ),
    Row(r"cuda-sm90-dispatch", "90a", 0),  # host code
)


def row_of(name: str) -> Row | None:
    return next((row for row in ROWS if re.fullmatch(row.pattern, name)), None)


@cache
def cuda_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, or the copy that Triton's package carries."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


def machine_code(path: Path, arch: str) -> dict[str, str]:
    """Kernel -> its instructions, as text."""
    tool = cuda_tool("cuobjdump")
    assert tool is not None
    command = [tool, "-sass", "-arch", f"sm_{arch}", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : ", text, flags=re.M)[1:]
    return dict(part.split("\n", 1) for part in parts)


def opcodes(path: Path, arch: str) -> dict[str, Counter[str]]:
    """Kernel -> how often each opcode stands in its machine code, modifiers left out."""
    opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)"
    return {name: Counter(re.findall(opcode, code, re.M)) for name, code in machine_code(path, arch).items()}


def wgmma_columns(path: Path) -> set[int]:
    """N of the products in an object: m64nNk16, m64nNk32."""
    code = "".join(machine_code(path, "90a").values())
    return {int(n) for n in re.findall(r"[HQ]GMMA\.64x(\d+)x(?:16|32)", code)}


def usage(log: str) -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes spilled) from what ptxas -v says."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [(m[1], m[2], int(m[5]), int(m[3]) + int(m[4])) for m in re.finditer(pattern, log, re.S)]


def cuda_objects() -> list[str]:
    return [source.object.removesuffix(".o") for source in _setup().cuda_sources()]


def built(row: Row) -> list[Path]:
    """The row's objects, where the extension was built here with its CUDA kernels."""
    names = [name for name in cuda_objects() if row_of(name) is row]
    paths = [BUILD / f"{name}.o" for name in names]
    if not names:
        pytest.skip(f"no kernels called {row.pattern}")
    if not all(path.exists() and log_of(path).exists() for path in paths):
        pytest.skip("the extension was built here without its CUDA kernels")
    return paths


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.log")


def test_every_object_has_one_row() -> None:
    for name in cuda_objects():
        assert row_of(name) is not None, f"{name}: give it a row in ROWS"


def test_the_log_is_understood() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'\nptxas info    : Function properties for _Z1kv\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers\n"
    )
    assert usage(log) == [("_Z1kv", "80", 40, 16)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.pattern)
def test_registers_and_spills(row: Row) -> None:
    for path in built(row):
        log = log_of(path).read_text()
        # C7508 setmaxnreg ignored, C7510 and C7512 wgmma serialised.
        assert "(C75" not in log, f"{path.name}: {log}"
        for kernel, arch, registers, spilled in usage(log):
            assert spilled == 0, f"{path.name}: {kernel} spills {spilled} bytes on sm_{arch}"
            assert registers <= row.max_registers, f"{path.name}: {kernel} uses {registers} registers on sm_{arch}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.max_registers], ids=lambda row: row.pattern)
def test_instructions(row: Row) -> None:
    """One of the 16-bit types: the code of the other differs in the kind of its HMMA."""
    paths = [path for path in built(row) if "-Half" not in path.name]
    if cuda_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump: install the CUDA toolkit or Triton")
    for path in paths:
        archs = {arch for _, arch, _, _ in usage(log_of(path).read_text())}
        assert archs, f"{path.name}: ptxas said nothing"
        if row.arch not in archs:
            pytest.skip(f"not built for sm_{row.arch}")
        kernels = opcodes(path, row.arch)
        every = sum(kernels.values(), Counter())
        assert not [op for op in row.needs if not every[op]], f"{path.name}: {row.needs}, {every.most_common(40)}"
        for kernel, counts in kernels.items():
            assert not [op for op in row.never if counts[op]], f"{kernel}: {row.never}, {counts.most_common(40)}"


#: Keys of the tiles of Q K^T and head_dim of P V; in the backward queries, columns of dK and of dV, and parts of dQ; in
#: its pass for dQ keys and head_dim.
COLUMNS = {
    "forward-BFloat16-64": {128, 64},
    "forward-BFloat16-96": {128, 96},
    "forward-BFloat16-128": {176, 128},
    "forward-BFloat16-192": {112, 128},
    "forward-BFloat16-256": {80, 256},
    "forward_fp8-E4M3-64": {128, 64},
    "forward_fp8-E4M3-128": {128},
    "forward_fp8-E4M3-256": {128},
    "backward-BFloat16-64": {64},
    "backward-BFloat16-128": {64, 128},
    "backward-BFloat16-192": {32, 96, 64},
    "backward-BFloat16-256": {32, 128, 64},
    "dq-BFloat16-64": {128, 64},
    "dq-BFloat16-128": {96, 128},
    "dq-BFloat16-192": {64, 192},
    "dq-BFloat16-256": {64, 256},
}


def hopper_object(kernel: str) -> Path:
    path = BUILD / f"cuda-sm90-{kernel}.o"
    if not path.exists():
        pytest.skip("the extension was built here without its Hopper kernels (no nvcc, or FASTATTN_CUDA=0)")
    if cuda_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump: install the CUDA toolkit or Triton")
    return path


@pytest.mark.parametrize("kernel", COLUMNS)
def test_shapes_of_the_products(kernel: str) -> None:
    assert wgmma_columns(hopper_object(kernel)) >= COLUMNS[kernel]


#: The fewest keys of a tile whose weights are computed while the last tile's product is in flight.
OVERLAPPED = {
    "forward-BFloat16-64": 128,
    "forward-BFloat16-96": 128,
    "forward-BFloat16-128": 128,
    "forward-BFloat16-192": 112,
    "forward-BFloat16-256": 80,
    "forward_fp8-E4M3-64": 128,
    "forward_fp8-E4M3-128": 128,
}


@pytest.mark.parametrize("kernel", OVERLAPPED)
def test_softmax_runs_beside_the_product(kernel: str) -> None:
    """In both loops, S has arrived (all but one group of products is done), its weights are computed, and only then P V
    is waited for: the compiler is free to move arithmetic across that wait, and does where no branch is before it."""
    for name, code in machine_code(hopper_object(kernel), "90a").items():
        waits = r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1(.*?)WARPGROUP\.DEPBAR\.LE gsb0, 0x0"
        exponentials = [len(re.findall("MUFU.EX2", between)) for between in re.findall(waits, code, re.S)]
        assert len(exponentials) == (2 if "GMMA" in code else 0), name
        assert all(count >= OVERLAPPED[kernel] // 2 for count in exponentials), f"{name}: {exponentials}"


@pytest.mark.parametrize("kernel", [f"backward-{dtype}-{dim}" for dtype in ("Half", "BFloat16") for dim in (64, 128)])
def test_p_and_ds_are_computed_beside_products(kernel: str) -> None:
    """In both loops, between the wait for S and the one for dP (one group behind each is in flight) all 32 weights of a
    thread are computed and the product with dO is issued, so that dS, which comes next, runs beside that."""
    for name, code in machine_code(hopper_object(kernel), "90a").items():
        waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code)
        parts = [(waits[n], waits[n + 1], waits[n + 2]) for n in range(1, len(waits) - 2, 2)]
        found = [(before, between, after) for before, between, after in parts if "MUFU.EX2" in between]
        assert len(found) == (2 if "GMMA" in code else 0), name
        for before, between, after in found:
            assert before == after == "1", name
            assert len(re.findall("MUFU.EX2", between)) == 32 and len(re.findall("HGMMA", between)) == 4, name
            assert "HGMMA" not in between[: between.index("MUFU.EX2")], name


#: Probe source -> architecture, and the opcodes that its wrappers stand for.
WRAPPERS = {
    "sm80": (
        "80",
        "HMMA LDSM LDGSTS LDGDEPBAR DEPBAR SHFL VOTE MUFU F2FP RED ATOMG LDS STS BAR",
    ),
    "sm90": ("90a", "HGMMA QGMMA UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED SYNCS STSM WARPGROUP FENCE"),
}


@pytest.mark.slow
@pytest.mark.parametrize("source", WRAPPERS)
def test_every_wrapper_assembles(source: str, tmp_path: Path) -> None:
    """ptxas takes the inline PTX, and the instructions are those that are meant."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or cuda_tool("cuobjdump") is None:
        pytest.skip("no CUDA compiler on this machine")
    arch, expected = WRAPPERS[source]
    cubin = tmp_path / f"{source}.cubin"
    flags = ["-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    paths = [f"-I{ROOT / 'csrc'}", f"-I{HERE}", str(HERE / "probes" / f"{source}.cu")]
    done = subprocess.run([nvcc, *flags, *paths, "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    every = sum(opcodes(cubin, arch).values(), Counter())
    missing = [op for op in expected.split() if not every[op]]
    assert not missing, f"{missing} are missing from {sorted(every)}"
