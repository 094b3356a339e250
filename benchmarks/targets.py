"""What the CPU kernels are to reach, and whether they do: tables from rows of the suite ``cpu``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Row
from benchmarks.table import Table

LONG = 2048  #: forward passes over sequences from here on are held to a share of the peak


@dataclass(frozen=True)
class Target:
    """What a kind of work is to reach: ratios to the best of torch's, and a share of a peak."""

    geomean: float
    worst: float
    peak: str = ""
    percent: float = 0.0


TARGETS = {
    "forward float32": Target(1.3, 1.0, "fma", 85),
    "forward bfloat16": Target(2.1, 1.3, "vdpbf16", 75),
    "forward+backward float32": Target(1.4, 1.0),
    "forward+backward bfloat16": Target(1.4, 1.0),
    "decode float32": Target(3.0, 3.0, "read", 85),
    "decode bfloat16": Target(8.0, 8.0, "read", 85),
    "masked": Target(2.0, 2.0),
    "short": Target(1.0, 1.0),
}


def _grouped(rows: Sequence[Row]) -> dict[str, list[dict[str, Row]]]:
    """The timed cells of each kind of work, each by contender; in the order of TARGETS."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.suite == "cpu":
            key = (row.labels["work"], row.case, row.dtype, row.direction)
            found.setdefault(key, {})[row.contender] = row
    groups: dict[str, list[dict[str, Row]]] = {work: [] for work in TARGETS}
    for (work, *_), cell in found.items():
        groups[work].append(cell)
    return {work: group for work, group in groups.items() if group}


def _best_of_torch(cell: Mapping[str, Row]) -> float | None:
    return min((r.median_ms for n, r in cell.items() if n.startswith("torch") and r.median_ms), default=None)


def _share(cell: Mapping[str, Row], peak: str) -> float | None:
    """Of a peak, in percent, that fastattn reached in the same rounds; None where that is not its limit."""
    ours, most = cell["fastattn cpu"], cell.get("peak " + peak)
    rate = "gbytes" if peak == "read" else "gflops"
    of_dtype = peak == "read" or (peak == "fma") == (ours.dtype == "float32")
    if not of_dtype or most is None or getattr(most, rate) is None or getattr(ours, rate) is None:
        return None
    return float(100 * getattr(ours, rate) / getattr(most, rate))


def _found_shares(work: str, group: Sequence[Mapping[str, Row]], peak: str) -> list[float]:
    """Of the cells that are held to a peak: what is long, or reads K and V from beyond the cache."""

    def held(labels: Mapping[str, Any]) -> bool:
        if TARGETS[work].peak == "read":
            return bool(labels.get("beyond_cache", True))  # older rows do not say
        return bool(labels["seqlen"] >= LONG)

    long = [cell for cell in group if held(cell["fastattn cpu"].labels)]
    return [x for cell in long if (x := _share(cell, peak)) is not None]


def _shares(work: str, group: Sequence[Mapping[str, Row]]) -> str:
    target, found = TARGETS[work], []
    for peak in ("read",) if target.peak == "read" else ("fma", "vdpbf16", "amx"):
        if shares := _found_shares(work, group, peak):
            wanted = f" (target {target.percent:.0f})" if peak == target.peak else ""
            found.append(f"{peak} {min(shares):.0f} to {max(shares):.0f}{wanted}")
    return "; ".join(found) or "–"


def _limit_met(work: str, group: Sequence[Mapping[str, Row]]) -> str:
    """Whether each cell reached its share of the peak, or bfloat16 gradients are nearer the oracle than torch's."""
    target = TARGETS[work]
    if target.peak:
        shares = _found_shares(work, group, target.peak)
        if not shares:
            return "not measured"
        return f"{sum(x >= target.percent for x in shares)} of {len(shares)} cells"
    if work == "forward+backward bfloat16":
        pairs = [
            (cell["fastattn cpu"].errors[name][1], cell["torch sdpa"].errors[name][1])
            for cell in group
            for name in ("dq", "dk", "dv")
            if all(name in cell[of].errors for of in ("fastattn cpu", "torch sdpa"))
        ]
        return f"{sum(ours < theirs for ours, theirs in pairs)} of {len(pairs)} gradients nearer than torch's"
    return "no limit to judge" if work != "masked" else "not judged: % of peak counts visible pairs only"


def target_table(rows: Sequence[Row]) -> Table:
    """A line per kind of work: ratios to the best of torch's, and what share of which peak was reached."""
    body = []
    for work, group in _grouped(rows).items():
        target, ratios = TARGETS[work], {}
        for cell in group:
            ours, theirs = cell["fastattn cpu"], _best_of_torch(cell)
            if ours.median_ms and theirs:
                ratios[f"{ours.case} {ours.dtype}"] = theirs / ours.median_ms
        figures = ["–", "nothing was timed", "no"]
        if ratios:
            geomean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            worst = min(ratios, key=lambda name: ratios[name])
            met = geomean >= target.geomean and ratios[worst] >= target.worst
            figures = [f"{geomean:.2f}×", f"{ratios[worst]:.2f}× {worst}", "yes" if met else "no"]
        wanted = f"{target.geomean:.1f}×, each {target.worst:.1f}×"
        body.append([work, f"{len(ratios)}", wanted, *figures, _shares(work, group), _limit_met(work, group)])
    headers = ["work", "cells", "target", "geomean", "worst cell", "met", "% of peak", "limit met by"]
    notes = (
        "Times of the best of torch's over fastattn's.",
        f"% of peak: the lowest and the highest cell of {LONG} keys or more; of those that decode, where K and V are",
        "larger than the largest cache; visible pairs only.",
        "A peak is a loop of multiply-adds in registers, or one that reads the cell's own K and V, timed in the same",
        "rounds. Limit: in each of those cells the share that is named as target; for gradients in bfloat16 a smaller",
        "rms error than torch's.",
    )
    return Table("cpu: targets", headers, body, notes)


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Errors against the float64 oracle, fastattn beside torch: the mean over a work's cells."""
    body = []
    for work, group in _grouped(rows).items():
        found: dict[tuple[str, str], list[list[float]]] = {}
        for cell in group:
            ours, theirs = cell["fastattn cpu"], cell["torch sdpa"]
            for name in ("dq", "dk", "dv") if "backward" in work else ("output",):
                if name in ours.errors and name in theirs.errors:
                    pairs = zip(ours.errors[name], theirs.errors[name], strict=True)
                    found.setdefault((ours.dtype, name), []).append([x for pair in pairs for x in pair])
        for key, errors in found.items():
            means = [sum(column) / len(column) for column in zip(*errors, strict=True)]
            body.append([work, *key, *(f"{x:.1e}" for x in means)])
    headers = ["work", "dtype", "of", "max, fastattn", "max, torch", "rms, fastattn", "rms, torch"]
    notes = (
        "Largest error over the largest value of the float64 oracle, rms error over its rms; mean over the cells.",
    )
    return Table("cpu: accuracy", headers, body, notes)
