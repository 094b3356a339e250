"""The CPU kernels against their targets: a table of ratios to torch and shares of the processor's peaks, and accuracy.

The peaks take their turns among the contenders of each cell, so a drift of the machine meets all of them alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import peers
from benchmarks.check import run_attention, run_naive
from benchmarks.machine import cache_bytes
from benchmarks.peaks import arithmetic_peak, read_peak
from benchmarks.peers import Case
from benchmarks.rows import Row
from benchmarks.suites import Bench, Entry, Job, judge, timed_calls
from benchmarks.timing import time_calls


@dataclass(frozen=True)
class Cell:
    """One case in one dtype."""

    case: Case
    dtype: torch.dtype
    works: Mapping[str, str]  #: direction: key of TARGETS


def cells(quick: bool, full: bool) -> Iterator[Cell]:
    """The grid: every length and head count with ``full``, a choice of them without."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    lengths: Sequence[int] = (64,) if quick else (512, 1024, 2048, 4096, 8192) if full else (512, 2048)
    for (name, dtype), dim, causal, length in product(dtypes.items(), (64, 128), (False, True), lengths):
        works = {direction: f"{direction} {name}" for direction in ("forward", "forward+backward")}
        if full or dim == 64:
            yield Cell(Case(1, 2 if quick else max(1, 4096 // length), length, length, dim, causal), dtype, works)
    keys: Sequence[int] = (1024, 4096, 16384, 65536) if full else (256,) if quick else (4096, 32768)
    for (name, dtype), n, heads, group in product(dtypes.items(), keys, (8, 32), (1, 4, 8)):
        if full or (heads, group) in ((8, 1), (32, 8)):
            yield Cell(
                Case(1, heads, 1, n, 128, heads_k=None if group == 1 else heads // group),
                dtype,
                {"forward": f"decode {name}"},
            )
    n = 64 if quick else 4096 if full else 2048
    for case in (
        Case(1, 2, n, n, 64, masked=True),
        Case(1, 2, n, n, 64, window=(n // 16 - 1, 0)),
        Case(1, 2, min(n, 1024), min(n, 1024), 64, dropout_p=0.1),
        Case(1, 2, n // 2, n // 2, 128, head_dim_v=64),
    ):
        for dtype in dtypes.values() if full else (torch.float32,):
            yield Cell(case, dtype, {"forward": "masked"})
    for n, dtype in product((16,) if quick else (16, 32, 64, 128) if full else (16, 128), dtypes.values()):
        yield Cell(Case(2 if quick else 64, 8, n, n, 64), dtype, {"forward": "short"})


def cpu_jobs(device: torch.device, quick: bool, full: bool = False) -> Iterator[Job]:
    for cell in cells(quick, full) if device.type == "cpu" else ():
        budget = 0.02 if quick else 0.5 if full else 0.1
        yield Job(f"cpu {cell.case} {_name(cell.dtype)}", partial(_cell, cell=cell, budget_s=budget))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cell(bench: Bench, cell: Cell, budget_s: float) -> Iterator[Row]:
    case, dtype = cell.case, cell.dtype
    q, k, v, mask, grad = case.inputs(dtype, bench.device)
    truth = tuple(run_naive(q, k, v, mask, grad, case.causal, wide, case.options) for wide in (torch.float64, dtype))
    entries = []
    for contender in peers.cpu_contenders(case, dtype):
        assert contender.attention is not None
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        entry = Entry(contender.name, partial(contender.attention, *leaves, mask), leaves, contender.blank)
        if not contender.blank and (entry.ours or not case.dropout_p):  # torch drops other entries
            check = partial(run_attention, contender.attention, q, k, v, mask, grad)
            judge(bench, entry, check, truth, f"{case} {_name(dtype)}", dtype)
        entries.append(entry)
    spec = case.spec(dtype, bench.device)
    visible = 1.0 if mask is None else mask.double().mean().item()
    beyond = k.nbytes + v.nbytes > cache_bytes()
    for direction, work in cell.works.items():
        peaks = {name: arithmetic_peak(name) for name in ("fma", "vdpbf16", "amx")}
        if work.startswith("decode"):
            peaks["read"] = read_peak(k, v)
        calls: dict[str, Any] = {"peak " + n: p[0] for n, p in peaks.items() if not isinstance(p, str)}
        for e in entries:
            if e.run is not None and not e.blank:
                calls[e.name] = timed_calls(e.run, e.wanted, grad, direction)
        samples = time_calls(calls, bench.device, budget_s)
        labels = {**case.labels(), "work": work, "beyond_cache": beyond}
        for name in (*(e.name for e in entries), *("peak " + n for n in peaks)):
            row = Row("cpu", str(case), direction, _name(dtype), name, dict(labels))
            found = next((e for e in entries if e.name == name), None)
            if found is not None:
                amount = (spec.flops(direction) * visible, float(spec.bytes(direction)))
                row.max_error, row.errors, why = found.max_error, dict(found.errors), found.blank
            else:
                peak = peaks[name.removeprefix("peak ")]
                why = peak if isinstance(peak, str) else None
                done = 0.0 if isinstance(peak, str) else float(peak[1])
                amount = (0.0, done) if name == "peak read" else (done, 0.0)
            if name not in samples:
                row.blank = {"median_ms": why or "not run"}
            else:
                sample = samples[name]
                row.median_ms, row.p20_ms, row.p80_ms = sample.median_ms, sample.p20_ms, sample.p80_ms
                row.samples = sample.count
                row.gflops, row.gbytes = (x / sample.median_ms / 1e6 or None for x in amount)
                row.blank["peak_memory_mib"] = "not measured: the CPU allocator keeps no peak"
            yield row
