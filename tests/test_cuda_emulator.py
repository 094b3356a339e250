"""The emulator: what each wrapper computes, and that it notices what it says it notices."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if shutil.which("c++") is None:
    pytest.skip("CUDA kernels are compiled for the emulator: no C++ compiler here", allow_module_level=True)

from tests.cases import CASES
from tests.cuda_emulation import probe as probing
from tests.cuda_emulation import record, sanitize
from tests.cuda_emulation.backend import Emulator, emulated_backend
from tests.cuda_emulation.build import HERE, ROOT
from tests.cuda_emulation.mutants import mutants, survivors, with_switches
from tests.cuda_emulation.probe import Probe

PROBES = probing.probes()


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return emulated_backend().emulator


def emulate(emulator: Emulator, probe: Probe) -> torch.Tensor:
    out = torch.full_like(probe.expected, -1)
    emulator.forget()
    emulator.register(probe.words, "in")
    emulator.register(out, "out", writable=True, initialised=False)
    try:
        probing.run(probing.declare(emulator.library), probe, out)
    finally:
        emulator.forget()
    return out


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_wrapper(probe: Probe, emulator: Emulator) -> None:
    """What a wrapper computes under emulation, against its definition written in torch."""
    probe.check(emulate(emulator, probe), probe.expected, "its definition")


RECORDINGS = record.recordings()


@pytest.mark.skipif(not RECORDINGS, reason="no recording: the probes have not yet run on a GPU")
@pytest.mark.parametrize("path", RECORDINGS or [None], ids=lambda p: p.stem if p else "none")
def test_recording(path: Path, emulator: Emulator) -> None:
    """What a GPU computed, bit for bit."""
    recorded = record.read(path)
    for probe in PROBES:
        if probe.name in recorded:
            words, out = recorded[probe.name]
            assert torch.equal(words, probe.words), f"{probe.name}: recorded with other inputs; record it again"
            probe.check(emulate(emulator, probe), out, path.stem)


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    outs = {probe.name: probe.expected for probe in PROBES[:3]}
    path = record.write(tmp_path / "device.npz", PROBES[:3], outs, {"device": "none"})
    for probe in PROBES[:3]:
        words, out = record.read(path)[probe.name]
        assert torch.equal(words, probe.words) and torch.equal(out, probe.expected)


def test_recording_is_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program that runs on a GPU, here with the emulator in its place; nvcc's part is below, where it is there."""

    original = probing.run

    def run(function: Any, probe: Probe, out: torch.Tensor) -> None:
        emulator.forget()
        emulator.register(probe.words, "in")
        emulator.register(out, "out", writable=True, initialised=False)
        original(function, probe, out)

    for name, value in (
        ("is_available", True),
        ("get_device_capability", (9, 0)),
        ("get_device_name", "NVIDIA H100"),
        ("synchronize", None),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    monkeypatch.setattr(record, "compile_probes", lambda folder, capability: emulator.module.__file__)
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    monkeypatch.setattr(probing, "run", run)
    record.main()
    emulator.forget()
    assert "nvidia-h100.npz" in capsys.readouterr().out
    for name, (words, out) in record.read(tmp_path / "nvidia-h100.npz").items():
        probe = next(probe for probe in PROBES if probe.name == name)
        assert torch.equal(words, probe.words)
        probe.check(out, probe.expected, "what was recorded")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_probes_compile_for_a_gpu(capability: tuple[int, int], tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler on this machine")
    probing.declare(ctypes.CDLL(str(record.compile_probes(tmp_path, capability))))


# What is read too early was either never written or written by a warp that is not waited for: the order decides.
EARLY = r"load of shared memory .*(nothing has written|not ordered after the write by warp|not been waited for)"

#: Kernel with a fault -> what the emulator says about it.
FAULTS = {
    "barrier_missing": EARLY,
    "warp_barrier_missing": r"with no warp_barrier\(\) between|" + EARLY,
    "overwritten": r"race: (store|load) of shared memory .* is not ordered after the (read|write) by warp",
    "unwritten": r"load of shared memory \+ 0xa0, which nothing has written",
    "copy_not_awaited": r"while a cp.async into it \(line [0-9]+\) has not been waited for",
    "copy_without_barrier": EARLY,
    "copy_not_committed": "ends with a cp.async that it never committed",
    "shared_bounds": "store: bytes 49144 to 49160 of the block's 49152 bytes",
    "shared_alignment": r"shared memory \+ 0x8 is not a multiple of 16 bytes",
    "global_bounds": "global memory outside of every tensor, 0 bytes past the end of in",
    "global_alignment": "is not a multiple of 16 bytes",
    "input_written": "store: in is an input",
    "output_read": r"load of element [0-9]+ of out, which nothing has written",
    "barrier_count": "deadlock.*waits in barrier 3, where 64 of 96 threads are.*warp 0.*warp 1",
    "lanes_missing": "deadlock.*waits in shfl.xor.*lanes 0000ffff",
    "lanes_disagree": "divergence: shfl.xor",
    "barrier_left": "the block ends while barrier 3 has 64 arrivals",
    "barrier_disagree": r"while others wait there for (64|128)|deadlock.*barrier 3, where 64 of 128 threads",
    "matrix_bounds": "ldmatrix: bytes .* of the block's 49152 bytes of shared memory",
    "copy_alignment": "cp.async: global address .* is not a multiple of 16 bytes",
    "warps_race": "race: store of element [0-9]+ of out is not ordered after the write by block 0 warp",
    "blocks_race": "race: store of element 0 of out is not ordered after the write by block [01] warp 0",
    "message": "race: load of element 0 of out is not ordered after the write by block 0 warp 0",
    "fenced_message": "race: load of element 78 of out is not ordered after the write by block 0 warp 2",
    "turns": r"deadlock \(3 more blocks have not started\).*waits in wait_until_equal",
    "atomic_and_store": "race: (store|red.add) of element 0 of out is not ordered after the (atomic operation|write)",
    "load_not_awaited": EARLY + "|without having waited for",
    "wrong_parity": r"deadlock.*waits in mbarrier_wait at shared memory \+ 40960 \(phase of parity 0",
    "wrong_bytes": "deadlock.*arrivals and 1024 bytes missing",
    "too_many_arrivals": "more arrivals than the count of 1 in one phase",
    "mbarrier_overwritten": r"the mbarrier at shared memory \+ 0xa000 has been overwritten",
    "init_not_fenced": r"has no fence_mbarrier_init\(\) after it",
    "proxy_not_fenced": r"missing proxy fence: bulk_store of shared memory \+ 0x0",
    "store_source_overwritten": r"while an asynchronous read of it \(line [0-9]+\) has not been waited for",
    "store_not_awaited": "ends before it has committed and waited for its bulk stores",
    "wgmma_touched": "accumulator 5 of lane 0 was touched before the wait",
    "wgmma_fragment": "was changed before the wait",
    "wgmma_no_fence": r"no wgmma_fence\(\)",
    "wgmma_no_wait": "ends before it has waited for its wgmmas",
    "wgmma_source_overwritten": r"store to shared memory \+ 0x0 while an asynchronous read of it",
    "wgmma_bounds": "of the block's 49152 bytes of shared memory",
    "wgmma_disagree": "the warps of a warpgroup issue different ones",
    "registers": "decrease to 32, but the warp has 24",
}


def run_fault(emulator: Emulator, name: str, wrong: bool) -> str | None:
    function = emulator.library.fastattn_fault
    function.restype = ctypes.c_char_p
    words, out = torch.arange(512, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    emulator.forget()
    emulator.register(words, "in")
    shared_out = name in ("message", "fenced_message", "turns", "atomic_and_store")
    emulator.register(out, "out", writable=True, initialised=shared_out)
    said = function(name.encode(), int(wrong), ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    emulator.forget()
    return None if said is None else said.decode()


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, emulator: Emulator) -> None:
    """A kernel with one fault is stopped, whatever the order of warps; without the fault it is not."""
    for seed in (0, 1, 2):
        emulator.configure(seed)
        try:
            assert run_fault(emulator, name, wrong=False) is None
            said = run_fault(emulator, name, wrong=True)
        finally:
            emulator.configure()
        assert said is not None, f"seed {seed}: nothing noticed"
        assert re.search(FAULTS[name], said, re.S), f"seed {seed}: {said}"


def test_bank_conflicts_are_counted(emulator: Emulator) -> None:
    emulator.configure(count_banks=True)
    counts = []
    for wrong in (False, True):
        emulator.statistics()
        assert run_fault(emulator, "banks", wrong) is None
        counts.append(emulator.statistics())
    emulator.configure()
    assert counts[0].ldmatrix_conflicts == 0 and counts[0].shared_conflicts == 0
    # Four matrices of 8 rows in one bank each; 32 words 8 apart: 4 banks of 8 words, in each of the 4 warps.
    assert counts[1].ldmatrix_conflicts == 4 * 7
    assert counts[1].shared_conflicts == 4 * 7


def test_mutants_change_one_place() -> None:
    """A barrier dropped, a count or a bound shifted; comments and templates left alone."""
    lines = "// barrier();|template <int N>|void f() {|    cp_async_wait<1>();|    barrier();|    if (i < n) g();|}"
    text = lines.replace("|", "\n")
    found = {(m.line, m.after) for m in mutants("f.h", text)}
    assert found == {
        (4, "(void)0;"),
        (4, "cp_async_wait<2>();"),
        (5, "(void)0;"),
        (6, "if (i <= n) g();"),
    }
    # One survivor must not excuse another on a line of the same text.
    keys = [m.key for m in mutants("f.h", text + text)]
    assert len(keys) == len(set(keys)) == 8
    for mutant in mutants("f.h", text):
        assert sum(a != b for a, b in zip(text.splitlines(), mutant.text.splitlines(), strict=True)) == 1


#: Every kind of change; what it computes tells them apart.
CHANGED = """int f(int a, int b) {
    int x = 0;
    cp_async_wait<0>();
    for (int n = 0; n < a; ++n) x += n / 2;
    if (a <= b && b >= 3) x += 1000;
    if (a > b) x += 2000;
    if (a == b) x += 4000;
    x += (min32(a, b) ^ max32(b, 3) * 4) + 1;
    if (a != 2) wait_until_equal(&x, 5);
    return x;
}
"""
PROGRAM = """#include "mutation/switch.h"
#include <cstdio>
static int waited;
template <int kPending> void cp_async_wait() { waited += 10 + kPending; }
void wait_until_equal(int*, int x) { waited += x; }
int min32(int a, int b) { return a < b ? a : b; }
int max32(int a, int b) { return a > b ? a : b; }
"""


def test_a_mutant_in_waiting_is_the_mutant(tmp_path: Path) -> None:
    """A switched function with each mutant on computes what the changed text computes, and knows whether it matters."""
    found = list(mutants("f.h", CHANGED))
    switched, inside = with_switches(CHANGED, enumerate(found))
    count = len(found)
    assert count == 15 and inside == set(range(count))
    alone = "".join(f"namespace m{n} {{\n{mutant.text}}}\n" for n, mutant in enumerate(found))
    run = 'waited = 0; y = {0}f(a, b); std::printf("%d %d ", y, waited);'
    runs = "".join(f"fastattn::mutation::active = {n}; {run.format('')} {run.format(f'm{n}::')}" for n in range(count))
    main = f"""int main() {{
    for (int a = 0; a < 6; ++a) for (int b = 0; b < 6; ++b) {{
        int y;
        fastattn::mutation::active = -1;
        for (auto& x : fastattn::mutation::matters) x = 0;
        {run.format("")}
        for (int n = 0; n < {count}; ++n) std::printf("%d ", fastattn::mutation::matters[n]);
        {runs}
        std::puts("");
    }}
}}"""
    body = switched.replace("#line 1\n", "")
    (tmp_path / "main.cpp").write_text(f"{PROGRAM}{body}{alone}{main}")
    command = ["c++", "-std=c++17", f"-I{HERE}", "main.cpp", str(HERE / "mutation/switch.cpp"), "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run(["./main"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    differed = set()
    for line in said.splitlines():
        numbers = [int(word) for word in line.split()]
        plain, matters, rest = numbers[:2], numbers[2 : 2 + count], numbers[2 + count :]
        for n in range(count):
            in_waiting, changed = rest[4 * n : 4 * n + 2], rest[4 * n + 2 : 4 * n + 4]
            assert in_waiting == changed, f"{found[n].key}: {in_waiting}, not {changed}"
            assert in_waiting == plain or matters[n], f"{found[n].key} matters"
            differed |= {n} if in_waiting != plain else set()
    assert differed == set(range(count))


@pytest.mark.parametrize("path", sorted(HERE.glob("survivors*.txt")), ids=lambda path: path.stem)
def test_survivors_have_reasons(path: Path) -> None:
    """And are mutants of the sources as they stand."""
    listed = survivors(path)
    assert listed and all(listed.values())
    sources = {key.split(": ", 1)[0] for key in listed}
    keys = {m.key for source in sources for m in mutants(source, (ROOT / "csrc" / source).read_text())}
    assert not set(listed) - keys


@pytest.mark.parametrize(
    ("said", "code", "errors", "clean"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, 0, True),
        ("========= ERROR SUMMARY: 1 error", sanitize.ERROR, 1, False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0, True),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", sanitize.ERROR, 3, False),
        ("========= ERROR SUMMARY: 0 errors", 1, 0, False),  # the program itself failed
        ("Killed", 137, None, False),
    ],
)
def test_what_the_sanitizer_says(said: str, code: int, errors: int | None, clean: bool, tmp_path: Path) -> None:
    """A row is clean only where the tool says so and the program ended well; a tool in the place of NVIDIA's."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    tool.chmod(0o755)
    row = sanitize.watch(str(tool), "memcheck", torch.float16, ["plain"])
    assert row["errors"] == errors and bool(row["said"]) != clean


def test_sanitizer_cases_exist() -> None:
    assert set(sanitize.NAMES.split()) <= {case.name for case in CASES}
    assert set(sanitize.DEFAULT_CASES) <= {name for known in sanitize.KNOWN.values() for name in known}
    assert set(sanitize.KNOWN[torch.float8_e4m3fn]) <= set(sanitize.DEFAULT_CASES)
