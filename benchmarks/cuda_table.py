"""What ``python -m benchmarks cuda`` says of its rows: ratios to the best rival, and which variants are worth it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.report import Table, machine_lines, make_console
from benchmarks.rows import Results, Row, distinct

#: Section -> who is to be beaten (None: the fastest that is not ours), and the aim: geometric mean, worst cell.
TARGETS: dict[str, tuple[str | None, float, float | None]] = {
    "forward": (None, 1.0, 0.9),
    "backward": (None, 1.0, 0.85),
    "backward, deterministic": ("torch cudnn", 1.2, 1.0),
    "decode": ("FA3", 1.2, None),
    "forward, e4m3": ("FA3 e4m3", 1.0, 0.9),
}
DEFAULT = "fastattn cuda"


def section(row: Row) -> str:
    if row.labels.get("decode"):
        return "decode"
    if row.labels.get("e4m3"):
        return "forward, e4m3"
    return f"{row.direction}, deterministic" if row.labels.get("deterministic") else row.direction


def groups(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """Section -> case -> contender -> its row, timed ones only."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row.median_ms is not None:
            found.setdefault(section(row), {}).setdefault(row.case, {})[row.contender] = row
    return found


def rival_ms(cell: dict[str, Row], rival: str | None) -> float | None:
    """The time to beat: of the rival, or where it is not there of the fastest that is not ours."""
    if rival in cell:
        return cell[rival].median_ms
    times = [row.median_ms for name, row in cell.items() if not name.startswith("fastattn") and row.median_ms]
    return min(times, default=None)


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def ratios(cells: dict[str, dict[str, Row]], contender: str, rival: str | None) -> dict[str, float]:
    """Case -> the rival's time over the contender's: above 1 is faster. "fastattn best": its fastest in each case."""
    found = {}
    for case, cell in cells.items():
        theirs = rival_ms(cell, rival)
        names = [n for n in cell if n.startswith("fastattn")] if contender == "fastattn best" else [contender]
        mine = min((cell[n].median_ms or math.inf for n in names if n in cell), default=None)
        if theirs is not None and mine is not None:
            found[case] = theirs / mine
    return found


def ratio_rows(rows: Sequence[Row]) -> Table:
    """Every contender of ours in every section against the section's rival."""
    body = []
    for name, cells in sorted(groups(rows).items(), key=lambda item: list(TARGETS).index(item[0])):
        rival, mean, worst = TARGETS[name]
        ours = [c for c in distinct(c for cell in cells.values() for c in cell) if c.startswith("fastattn")]
        for contender in [*ours, "fastattn best"]:
            found = ratios(cells, contender, rival)
            if not found:
                continue
            case = min(found, key=lambda each: found[each])
            aim = f"{mean:.1f}×" + (f", worst {worst:.2f}×" if worst else "")
            seen = rival if rival and any(rival in cell for cell in cells.values()) else "the fastest other"
            body.append(
                [
                    name,
                    contender,
                    seen,
                    str(len(found)),
                    f"{geomean(list(found.values())):.2f}×",
                    f"{found[case]:.2f}×",
                    case,
                    aim,
                ]
            )
    headers = ["section", "contender", "against", "cells", "geomean", "worst", "in", "aim"]
    return Table("Time of the rival over ours: above 1 is faster", headers, body)


def cell_table(name: str, cells: dict[str, dict[str, Row]]) -> Table:
    """A section's cells: TFLOP/s of the default, of our fastest (named) and of the rivals."""
    rival = TARGETS[name][0]
    others = [c for c in distinct(c for cell in cells.values() for c in cell) if not c.startswith("fastattn")]
    decode = name == "decode"

    def rate(row: Row | None) -> str:
        if row is None or row.median_ms is None:
            return "–"
        return (
            f"{1000 * row.median_ms:.1f} µs, {row.copy_percent or 0:.0f}%"
            if decode
            else f"{(row.gflops or 0) / 1000:.0f}"
        )

    body = []
    for case, cell in cells.items():
        ours = [row for c, row in cell.items() if c.startswith("fastattn")]
        best = min(ours, key=lambda row: row.median_ms or math.inf) if ours else None
        theirs = rival_ms(cell, rival)
        ratio = f"{theirs / best.median_ms:.2f}×" if best and best.median_ms and theirs else "–"
        named = f"{rate(best)} ({best.contender.removeprefix('fastattn ')})" if best else "–"
        body.append([case, rate(cell.get(DEFAULT)), named, *(rate(cell.get(c)) for c in others), ratio])
    unit = "time, % of the copy's bandwidth" if decode else "TFLOP/s"
    return Table(f"{name}: {unit}", ["case", DEFAULT, "our fastest", *others, "ratio"], body)


def variant_table(rows: Sequence[Row]) -> Table:
    """Per head_dim and mask: each kernel's time over the default's, over the lengths that both were timed at."""
    forward = groups(rows).get("forward", {})
    kinds: dict[tuple[int, bool], list[dict[str, Row]]] = {}
    for cell in forward.values():
        if DEFAULT in cell:
            labels = cell[DEFAULT].labels
            kinds.setdefault((labels["head_dim"], labels["causal"]), []).append(cell)
    body = []
    for (dim, causal), found in sorted(kinds.items()):
        means = {}
        for name in distinct(c for cell in found for c in cell if c.startswith(DEFAULT)):
            speed = [(cell[DEFAULT].median_ms or 0) / (cell[name].median_ms or 1) for cell in found if name in cell]
            means[name] = geomean(speed)
        order = sorted(means, key=lambda each: -means[each])
        said = ", ".join(f"{name.removeprefix('fastattn ')} {means[name]:.2f}×" for name in order)
        body.append([str(dim), "causal" if causal else "full", said])
    return Table(
        "Forward kernels, fastest first: the default's time over theirs", ["head_dim", "mask", "kernels"], body
    )


def print_tables(results: Results) -> None:
    console = make_console()
    for text in machine_lines(results):
        console.print(text, highlight=False)
    for name, cells in groups(results.rows).items():
        console.print(cell_table(name, cells).rich())
    for table in (variant_table(results.rows), ratio_rows(results.rows)):
        if table.rows:
            console.print(table.rich())
    blanks: dict[tuple[str, str], int] = {}
    for row in results.rows:
        if reason := row.blank.get("median_ms"):
            blanks[row.contender, reason] = blanks.get((row.contender, reason), 0) + 1
    for (contender, reason), count in blanks.items():
        console.print(f"not timed, {count} cells: {contender}: {reason}", highlight=False)
