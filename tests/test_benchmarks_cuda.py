"""``python -m benchmarks cuda`` on the CPU: its cells, check, budget, isolation and tables. The GPU is stood in for."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("pybind11")
pytest.importorskip("ninja")

from benchmarks import cuda, machine
from benchmarks.__main__ import main
from benchmarks.cuda_cells import (
    HEAD_DIMS,
    Cell,
    Contender,
    Truth,
    cells,
    contenders,
    environment,
    one_head,
    packed_forward,
    prepare,
)
from benchmarks.cuda_table import cell_table, groups, print_tables, ratio_rows, section, variant_table
from benchmarks.isolated import Child, Failure, Pulse
from benchmarks.peers import Case
from benchmarks.rows import Results, Row
from fastattn import reference
from fastattn.backends import cuda as backend
from tests.child_jobs import Crash, InProcess, serve
from tests.cuda_emulation.backend import EmulatedBackend
from tests.tolerance import FLOAT64, assert_close_to_oracle

CPU = torch.device("cpu")
SMALL = Case(1, 4, 50, 50, 16, causal=True, heads_k=2)


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["cuda", "--out", str(tmp_path)]) == 2
    assert "torch sees no GPU here, and nothing was measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_cells_cover_the_grid_and_the_first_ones_every_kind() -> None:
    every = cells()
    assert len(set(every)) == len(every) == 7 * 3 * 3 * 2 + 5 + 2 * 3 * 2

    def kinds(some: list[Cell]) -> set[tuple[Any, ...]]:
        return {(c.case.head_dim, c.case.causal, c.direction, c.deterministic, c.case.seqlen_q == 1) for c in some}

    assert kinds(every[:23]) == kinds(every)
    assert all(c.case.heads * c.case.head_dim == 2048 for c in every if c.case.seqlen_q > 1)
    assert {c.case.head_dim for c in every} == set(HEAD_DIMS)


@pytest.mark.parametrize("causal", [False, True])
def test_the_oracle_is_the_reference(causal: bool) -> None:
    q, k, v, grad = (torch.randn(1, h, s, 8).double() for h, s in ((3, 20), (1, 33), (1, 33), (3, 20)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = reference.attention(*leaves, causal=causal)
    wanted = torch.autograd.grad(out, leaves, grad)
    got = one_head(q[0], k[0, 0], v[0, 0], grad[0], causal, rows=7)
    only = one_head(q[0], k[0, 0], v[0, 0], None, causal, rows=7)["output"]
    torch.testing.assert_close(only, out[0].detach(), **FLOAT64)
    for name, x in zip(("dq", "dk", "dv"), wanted, strict=True):
        torch.testing.assert_close(got[name], x[0].reshape(got[name].shape), **FLOAT64)


def test_cells_of_e4m3_have_numbers_that_16_bits_hold() -> None:
    """And contenders that take them in 8 bits, held to the same rule."""
    cell = Cell(SMALL, e4m3=True)
    inputs = cell.inputs(torch.bfloat16, CPU)
    assert all(torch.equal(x, x.to(torch.float8_e4m3fn).to(x.dtype)) for x in inputs[:3])
    eight = next(c for c in contenders(cell, CPU) if c.e4m3)
    out, truth = prepare(eight, cell, inputs)(), Truth.of(cell, inputs)
    assert truth.complaint(out, torch.bfloat16)[1] is None
    assert truth.complaint(1.5 * out, torch.bfloat16)[1] is not None
    assert (
        cell.labels()["plain"] is False and section(row("S1", "fastattn cuda e4m3", 1.0, e4m3=True)) == "forward, e4m3"
    )


def test_a_batch_is_packed_sequences_of_one_length() -> None:
    case = Case(3, 4, 20, 20, 16, causal=True, heads_k=2)
    q, k, v, _ = Cell(case).inputs(torch.float32, CPU)
    out = packed_forward(case, "cpu")(q, k, v)
    wide = reference.attention(q.double(), k.double(), v.double(), causal=True)
    assert_close_to_oracle(out, reference.attention(q, k, v, causal=True), wide)
    names = [c.name for c in contenders(Cell(case), torch.device("cuda"))]
    assert "fastattn cuda packed" in names
    assert "fastattn cuda packed" not in [c.name for c in contenders(Cell(SMALL), torch.device("cuda"))]


@pytest.mark.skipif(shutil.which("c++") is None, reason="CUDA kernels are compiled for the emulator: no C++ compiler")
@pytest.mark.parametrize(
    "cell",
    [
        Cell(Case(2, 2, 40, 40, 64, causal=True, heads_k=1)),
        Cell(SMALL, "backward"),
        Cell(SMALL, "backward", True),
        Cell(Case(1, 4, 1, 90, 128, heads_k=2)),
        Cell(Case(1, 2, 40, 40, 64), e4m3=True),
    ],
    ids=str,
)
def test_every_contender_of_ours_on_the_emulator(
    cell: Cell, hopper: None, emulated: EmulatedBackend, monkeypatch: pytest.MonkeyPatch, in_process: type[InProcess]
) -> None:
    """Of a Hopper GPU: each is called as it will be there, found right, and timed, whatever that says here."""
    monkeypatch.setattr(backend, "_capability", lambda device: (9, 0))
    entries = [e for e in contenders(cell, torch.device("cuda")) if e.name.startswith("fastattn cuda")]
    assert [e.blank for e in entries] == [None] * len(entries)
    names = {e.name.split(" (")[0] for e in entries}
    if cell.case.seqlen_q > 1 and cell.direction == "forward" and not cell.e4m3:
        every = {f"fastattn cuda{kind}{rest}" for kind in ("", " packed") for rest in ("", " sm80", " sm90 v0")}
        assert names == every - {"fastattn cuda packed sm90 v0"}  # which packed sequences never get

    def who(cell: Cell, device: torch.device) -> list[Contender]:
        return entries

    try:
        rows, _ = cuda.serve(cuda.Job(cell, 0.02, {}, True), Pulse(multiprocessing), "cpu", who)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [row.blank for row in rows] == [{}] * len(entries)
    assert all(row.median_ms and row.max_error is not None for row in rows)
    print_tables(Results(machine.describe(CPU, []), rows))


def test_environment_is_put_back() -> None:
    before = dict(os.environ)
    with environment({"FASTATTN_SM90_VARIANT": "3", "HOME": "elsewhere"}):
        assert os.environ["FASTATTN_SM90_VARIANT"] == "3" and os.environ["HOME"] == "elsewhere"
    assert dict(os.environ) == before


def _scaled(factor: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return contenders(Cell(SMALL), CPU)[0].forward(q, k, v) * factor


def _crash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise Crash


def _refuse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: misaligned address")


def _who(cell: Cell, device: torch.device) -> list[Contender]:
    cpu, torch_sdpa = contenders(cell, device)
    wrong, loose = (Contender(name, partial(_scaled, 1.5)) for name in ("fastattn wrong", "other wrong"))
    broken = [Contender("fastattn refuses", _refuse), Contender("fastattn crashes", _crash)]
    return [cpu, wrong, loose, Contender("FA3", _crash, blank="FA3 is not installed"), *broken, torch_sdpa]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    monkeypatch.setattr(cuda, "Child", InProcess)
    monkeypatch.setattr(cuda, "_ceilings", lambda device, quick: {"matmul bfloat16": 100.0, "copy": 10.0})
    InProcess.made = 0
    return InProcess


def test_who_is_wrong_is_not_timed_and_who_crashes_is_barred(in_process: type[InProcess]) -> None:
    todo = [Cell(SMALL), Cell(SMALL, "backward", True)]
    session, results = cuda.Session(CPU, 600.0, _who), Results({}, [])
    session.measure(todo, results)
    assert in_process.made == 3, "one child more for each direction in which one crashed"
    assert len(results.rows) == 2 * 7 and not session.skipped
    for row in results.rows:
        reason = row.blank.get("median_ms", "")
        assert (row.median_ms is None) == bool(reason)
        assert reason.startswith(
            {
                "fastattn wrong": "wrong: ",
                "fastattn refuses": "failed: RuntimeError: CUDA error: misaligned",
                "fastattn crashes": "the process ended with -11, at B1 H4/2 S50 D16 causal",
                "FA3": "FA3 is not installed",
            }.get(row.contender, "")
        )
        timed = row.contender in ("fastattn cpu", "torch sdpa", "other wrong")
        assert (row.median_ms is not None and row.gflops is not None and row.max_error is not None) == timed
        assert row.labels["deterministic"] == (row.direction == "backward")
    assert len(session.failures) == 2 * 3
    assert not torch.are_deterministic_algorithms_enabled()
    assert results.machine["ceilings"]["copy"] == 10.0


def test_the_time_that_is_left_is_kept_to(in_process: type[InProcess], capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 10.0
        return now[0]

    session, results = cuda.Session(CPU, 45.0, contenders, clock=clock), Results({}, [])
    todo = [Cell(SMALL), Cell(SMALL, "backward")] * 3
    session.measure(todo, results)
    assert 0 < len(results.rows) < 2 * len(todo)
    assert session.skipped == todo[len(results.rows) // 2 :]
    assert f"out of time: {len(session.skipped)} of 6 cells not run" in capsys.readouterr().out
    assert session.job(todo[0], 0.6).budget_s == 0.3 and session.job(todo[0], 100.0).budget_s == 1.0


def test_a_child_that_dies_or_hangs_is_told_from_one_that_answers() -> None:
    child = Child(serve, (), patience_s=1.0)
    assert [child.run("a"), child.run("b")] == ["a", "b"]
    assert child.run("exit") == Failure("who does exit", "the process ended with 7")
    child = Child(serve, (), patience_s=1.0)
    assert child.run("hang") == Failure("who does hang", "no answer in 1 s")


def row(case: str, contender: str, ms: float, causal: bool = False, **labels: Any) -> Row:
    kind = {"head_dim": 64, "causal": causal, "deterministic": False, "decode": False, **labels}
    return Row("cuda", case, "forward", "bfloat16", contender, kind, median_ms=ms, gflops=1e5 / ms, copy_percent=50.0)


def test_tables() -> None:
    rows = [
        row("S1", "fastattn cuda", 2.0),
        row("S1", "fastattn cuda sm90 v3 (128 x 128)", 1.0),
        row("S1", "torch cudnn", 2.0),
        row("S1", "FA3", 4.0),
        row("S2", "fastattn cuda", 1.0),
        row("S2", "fastattn cuda sm90 v3 (128 x 128)", 2.0),
        row("S2", "torch cudnn", 0.5),
        row("S3", "fastattn cuda", 0.010, decode=True),
        row("S3", "torch flash", 0.005, decode=True),
        row("S3", "FA3", 0.020, decode=True),
        row("S4", "fastattn cuda", 1.0, causal=True),
    ]
    table = {(r[0], r[1]): r[2:7] for r in ratio_rows(rows).rows}
    assert table["forward", "fastattn cuda"] == ["the fastest other", "2", "0.71×", "0.50×", "S2"]  # (1, 1/2)
    assert table["forward", "fastattn best"] == ["the fastest other", "2", "1.00×", "0.50×", "S2"]  # (2, 1/2)
    assert table["decode", "fastattn cuda"] == ["FA3", "1", "2.00×", "2.00×", "S3"]
    variants = {(r[0], r[1]): r[2] for r in variant_table(rows).rows}
    assert variants["64", "full"] == "cuda 1.00×, cuda sm90 v3 (128 x 128) 1.00×"
    assert variants["64", "causal"] == "cuda 1.00×"
    sections = groups(rows)
    full = cell_table("forward", sections["forward"])
    assert full.headers[3:] == ["torch cudnn", "FA3", "ratio"]
    assert full.rows[0] == ["S1", "50", "100 (cuda sm90 v3 (128 x 128))", "50", "25", "2.00×"]
    assert cell_table("decode", sections["decode"]).rows[0][1] == "10.0 µs, 50%"
