"""What the CUDA sources promise and no compiler checks: where instructions stand, and what the host side calls."""

from __future__ import annotations

import re

from tests.cuda_emulation.build import HERE, ROOT

CUDA = ROOT / "csrc" / "cuda"
WRAPPERS = {path.name: path for path in (CUDA / "ptx").glob("*.h")}
KERNELS = [path for path in CUDA.rglob("*") if path.suffix in (".h", ".cu") and path.parent.name != "ptx"]

#: None of them allocates, waits or is refused while a stream is captured into a graph.
HOST_CALLS = {
    "cudaGetDevice", "cudaSetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaLaunchKernel",
    "cudaGetErrorName", "cudaGetErrorString", "cudaGetDriverEntryPoint", "cudaGetDriverEntryPointByVersion",
}  # fmt: skip
#: Of those, the ones that cannot fail; the last is what a destructor does.
UNCHECKED = {"cudaGetErrorName", "cudaGetErrorString"}
RESTORES = "if (switched_) cudaSetDevice(previous_);"


def code(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def test_kernels_contain_no_instructions() -> None:
    """No inline assembly, no builtins of CUDA or the compiler, no architecture asked for: all that is in ptx/."""
    words = r"\basm\b|\b__\w+|\b(?:thread|block)Idx\b|\b(?:block|grid)Dim\b|\batomic[A-Z]\w+"
    for path in KERNELS:
        assert not re.findall(words, code(path.read_text())), path.relative_to(ROOT)


def test_every_wrapper_has_its_section_and_its_twin() -> None:
    """A header with instructions names the section of the PTX ISA, and one of the same name calls the emulator."""
    twins = {path.name for path in (HERE / "cuda" / "ptx").glob("*.h")}
    for name, path in WRAPPERS.items():
        text = path.read_text()
        if not re.search(r"\basm\b|\b__\w+_sync\b|\b__ldg\b|threadIdx", code(text)) or name == "opaque.h":
            continue  # opaque.h: an empty instruction
        assert "// PTX ISA, " in text, name
        assert name in twins, f"{name} has no header in tests/cuda_emulation/cuda/ptx"


def test_every_return_code_is_looked_at() -> None:
    """And nothing is called that allocates, waits or cannot be captured in a CUDA graph."""
    called = set()
    for path in [*KERNELS, *WRAPPERS.values()]:
        text = code(path.read_text()).replace(RESTORES, "")
        assert not re.findall(r"\b(?:malloc|calloc|new)\b|std::(?:vector|make_unique|make_shared)", text), path
        for found in re.finditer(r"\bcuda[A-Z]\w+(?=\()", text):
            called.add(found[0])
            before = re.sub(r"\s+", "", text[: found.start()])
            checked = before.endswith("check_cuda(") or found[0] in UNCHECKED
            assert checked, f"{path.relative_to(ROOT)}: {found[0]}() is not in check_cuda()"
    assert called == HOST_CALLS


#: Wrappers that compute nothing which could be recorded, or that are how another is built.
NOT_PROBED = {
    "bit_cast", "opaque", "pin_registers", "prefetch_tensor_map", "setmaxnreg_increase", "mbarrier_try_wait",
    "block_index_y", "block_index_z", "grid_size", "to_float", "ss", "rs",
}  # fmt: skip


def test_every_wrapper_has_a_probe() -> None:
    probes = "".join(path.read_text() for path in (HERE / "probes").glob("*"))
    found = {
        name
        for path in WRAPPERS.values()
        for name in re.findall(r"FASTATTN_(?:HOST_)?DEVICE[^;{(]*?\b(\w+)\(", code(path.read_text()))
    }
    missing = {name for name in found if not re.search(rf"\b{name}\b", probes)}
    assert missing <= NOT_PROBED, f"no probe calls {sorted(missing - NOT_PROBED)}"
    assert found >= NOT_PROBED
