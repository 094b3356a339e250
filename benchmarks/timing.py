"""Interleaved timing: every contender once per round, so that a drift of the machine meets all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 3, 50
CPU_SAMPLE_MS = 2.0  # a CPU sample repeats its call until it lasts about this long
SLOW_MS = 100.0  # a call this slow is warmed up once, any other twice


@dataclass(frozen=True)
class Sample:
    """Times of one contender, in milliseconds per call."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    count: int


def _quantile(ordered: list[float], fraction: float) -> float:
    """Linear interpolation between the order statistics, as ``numpy.quantile`` does by default."""
    at = fraction * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _summary(times: list[float]) -> Sample:
    ordered = sorted(times)
    return Sample(_quantile(ordered, 0.5), _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered))


class _Cpu:
    """Wall-clock time of a call, repeated until the clock's resolution and overhead do not matter."""

    def __init__(self) -> None:
        self.repeats: dict[str, int] = {}

    def once(self, name: str, call: Call) -> float:
        repeats = self.repeats.get(name, 1)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats * 1e3

    def calibrate(self, name: str, call: Call) -> None:
        self.repeats[name] = max(1, round(CPU_SAMPLE_MS / max(self.once(name, call), 1e-4)))


class _Cuda:
    """CUDA-event time of one call whose inputs are not in the L2 cache: a buffer larger than it is written before."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(512 << 20, dtype=torch.int8, device=device)

    def once(self, name: str, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # also keeps the device busy while the call's kernels are being launched
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def calibrate(self, name: str, call: Call) -> None:
        self.once(name, call)  # a call is timed alone; this one only warms up


def time_calls(calls: Mapping[str, Call], device: torch.device, budget_s: float = 1.0) -> dict[str, Sample]:
    """Median, p20 and p80 of every call, in rounds of shuffled order, for about ``budget_s`` seconds.

    At least 3 rounds are made however slow the calls are, at most 50.
    """
    clock = _Cuda(device) if device.type == "cuda" else _Cpu()
    for name, call in calls.items():  # warm-up: compiles, fills allocator and thread pools, sets the repeats
        if clock.once(name, call) < SLOW_MS:
            clock.calibrate(name, call)
    order = list(calls)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
            break
        shuffle(order)
        for name in order:
            times[name].append(clock.once(name, calls[name]))
    return {name: _summary(each) for name, each in times.items()}


def peak_memory_mib(call: Call, device: torch.device) -> float | None:
    """MiB that one call allocates beyond what was allocated before it; None on a CPU, which keeps no such count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
