"""``python -m benchmarks cuda``: every CUDA kernel and variant beside Triton, torch's cuDNN and FLASH, and FA3.

One interleaved run per cell: head_dim 64, 128 and 256, 512 to 32768 keys, full and causal; forward, backward, and
backward under ``torch.use_deterministic_algorithms``; single queries on 1k to 128k keys; and forwards on e4m3 beside
16-bit ones on the same numbers. Batches also run as packed sequences. Each contender is checked on the cell's own
inputs before it is timed. Cells run in a child process, which is started again without whoever crashed or hung it.
``--seconds`` is the time that the whole run may take; what it does not suffice for is said.

All variants of the Hopper forwards: ``FASTATTN_SM90_VARIANTS=1 pip install .`` on the machine with the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cuda_cells import Cell, Contender, Truth, cells, contenders, environment, prepare
from benchmarks.cuda_table import print_tables
from benchmarks.isolated import Child, Failure, Pulse
from benchmarks.rows import Results, Row
from benchmarks.timing import peak_memory_mib, time_calls

DTYPE = torch.bfloat16
MAX_RESTARTS = 12
Contenders = Callable[[Cell, torch.device], list[Contender]]


@dataclass(frozen=True)
class Job:
    """A cell, how long its timing may take, and who has failed before: contender -> reason."""

    cell: Cell
    budget_s: float
    barred: Mapping[str, str]
    quick: bool = False
    suite: str = "cuda"


@cache
def _ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    return machine.ceilings(device, (DTYPE,), quick)


def serve(job: Job, pulse: Pulse, device_name: str, who: Contenders) -> tuple[list[Row], dict[str, float]]:
    """In the child: the rows of one cell, and the machine's ceilings."""
    device = torch.device(device_name)
    pulse.beat()
    ceilings = _ceilings(device, job.quick)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        return run_cell(job, device, who(job.cell, device), ceilings, pulse), ceilings
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run_cell(
    job: Job, device: torch.device, entries: Sequence[Contender], ceilings: Mapping[str, float], pulse: Pulse
) -> list[Row]:
    """Check, then time in turns. Whoever fails has a row that says so."""
    cell = job.cell
    inputs = cell.inputs(DTYPE, device)
    truth = Truth.of(cell, inputs)
    if cell.deterministic:  # its filling of fresh tensors would be timed with the kernels
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    rows = {e.name: _row(job.suite, cell, e.name) for e in entries}
    calls: dict[str, Callable[[], Any]] = {}
    for entry in entries:
        row = rows[entry.name]
        blank = entry.blank or job.barred.get(entry.name)
        if blank is None:
            pulse.beat(entry.name)
            blank = _check(entry, cell, inputs, truth, row, calls, device, pulse)
        if blank is not None:
            row.blank["median_ms"] = blank
    pulse.beat()
    samples = time_calls(calls, device, job.budget_s) if calls else {}
    pulse.beat()
    spec = cell.case.spec(DTYPE, device)
    for name, sample in samples.items():
        row = rows[name]
        row.median_ms, row.p20_ms, row.p80_ms, row.samples = (
            sample.median_ms,
            sample.p20_ms,
            sample.p80_ms,
            sample.count,
        )
        row.gflops = spec.flops(cell.direction) / sample.median_ms / 1e6
        row.gbytes = spec.bytes(cell.direction) / sample.median_ms / 1e6
        row.matmul_percent = 100 * row.gflops / max(v for k, v in ceilings.items() if k.startswith("matmul"))
        row.copy_percent = 100 * row.gbytes / ceilings["copy"]
    return list(rows.values())


def _row(suite: str, cell: Cell, name: str) -> Row:
    return Row(suite, str(cell.case), cell.direction, str(DTYPE).removeprefix("torch."), name, cell.labels())


def _check(
    entry: Contender,
    cell: Cell,
    inputs: Any,
    truth: Truth,
    row: Row,
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    pulse: Pulse,
) -> str | None:
    """Puts a call that is right among ``calls``; why not, or None. A kernel that is not ours is timed anyway."""
    try:
        with environment(entry.environment):
            call = prepare(entry, cell, inputs)
            first = call()
            _synchronize(device)
            row.max_error, wrong = truth.complaint(first, DTYPE)
            if cell.deterministic and wrong is None and not _same(first, call()):
                wrong = "wrong: two calls differ"
            del first
            row.peak_memory_mib = peak_memory_mib(call, device)
    except Exception as error:  # a kernel's failure is a result
        _synchronize(device)  # where this raises too the context is lost, and the process ends with it
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if wrong is not None and entry.ours:
        return wrong

    def timed() -> None:
        pulse.beat(entry.name)
        with environment(entry.environment):
            call()

    calls[entry.name] = timed
    return None


def _same(first: Any, second: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Session:
    """The parent's side: which cells are left, who is barred, how much time there is."""

    device: torch.device
    seconds: float
    who: Contenders = contenders
    quick: bool = False
    patience_s: float = 90.0
    suite: str = "cuda"
    clock: Callable[[], float] = time.monotonic
    barred: dict[tuple[str, str, int], str] = field(default_factory=dict)  #: contender, direction, head_dim -> reason
    failures: list[str] = field(default_factory=list)
    skipped: list[Cell] = field(default_factory=list)

    def measure(self, todo: Sequence[Cell], results: Results, save: Callable[[], None] = lambda: None) -> None:
        """Fills ``results`` cell by cell."""
        end, restarts = self.clock() + self.seconds, 0
        left, child = list(todo), self._child()
        while left:
            if self.clock() >= end or restarts > MAX_RESTARTS:
                why = "out of time" if restarts <= MAX_RESTARTS else f"{restarts} child processes have failed"
                self.skipped = left
                print(f"{why}: {len(left)} of {len(todo)} cells not run, from {left[0]} on", flush=True)
                break
            answer = child.run(self.job(left[0], (end - self.clock()) / len(left)))
            if isinstance(answer, Failure):
                restarts += 1
                self._bar(left, answer)
                child = self._child()
                continue
            rows, results.machine["ceilings"] = answer
            results.rows += rows
            self.failures += [
                f"{row.contender}, {left[0]}: {row.blank['median_ms']}"
                for row in rows
                if row.contender.startswith("fastattn")
                and row.blank.get("median_ms", "").startswith(("wrong", "failed"))
            ]
            print(line(left.pop(0), rows), flush=True)
            save()
        child.stop()

    def job(self, cell: Cell, share_s: float) -> Job:
        """Half of a cell's share of the time left is for its timing, the other for checks and compilers."""
        key = (cell.direction, cell.case.head_dim)
        barred = {name: reason for (name, *of), reason in self.barred.items() if tuple(of) == key}
        return Job(cell, min(max(share_s / 2, 0.02), 1.0), barred, self.quick, self.suite)

    def _child(self) -> Child:
        return Child(serve, (str(self.device), self.who), self.patience_s)

    def _bar(self, left: list[Cell], failure: Failure) -> None:
        cell = left[0]
        print(f"{cell}: {failure.contender or 'the program'}: {failure.reason}", flush=True)
        self.failures.append(f"{failure.contender or 'the program'}, {cell}: {failure.reason}")
        if failure.contender:
            self.barred[failure.contender, cell.direction, cell.case.head_dim] = f"{failure.reason}, at {cell}"
        else:
            self.skipped.append(left.pop(0))


def line(cell: Cell, rows: Sequence[Row]) -> str:
    """A cell's contenders, fastest first."""
    timed = sorted((row for row in rows if row.median_ms), key=lambda row: row.median_ms or 0.0)
    return f"{cell}: " + ", ".join(f"{row.contender} {row.median_ms:.4g} ms" for row in timed)


def run(out: Path, device: torch.device, quick: bool, seconds: float, arguments: Sequence[str]) -> int:
    """Writes ``cuda.json`` and prints the tables; 1 if a kernel was wrong, crashed or hung, 2 without a GPU."""
    if device.type != "cuda" and not quick:
        print(
            "python -m benchmarks cuda: torch sees no GPU here, and nothing was measured. "
            "(--device cpu --quick rehearses the program with the CPU kernels.)"
        )
        return 2
    results = Results(machine.describe(device, arguments), [])
    path = out / "cuda.json"
    session = Session(device, seconds, quick=quick)
    session.measure(cells(quick), results, lambda: results.save(path))
    results.save(path)
    print_tables(results)
    print(f"written: {path}")
    for failure in session.failures:
        print(f"FAILED: {failure}")
    return 1 if session.failures else 0
