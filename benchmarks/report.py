"""Tables and a plot, made from rows alone: ``python -m benchmarks report results.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.rows import Results, Row, distinct
from benchmarks.table import Table
from benchmarks.targets import accuracy_table, target_table


def make_console() -> Console:
    """The terminal; a log, which has no width to keep to, gets 140 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _number(x: float | None, reason: str = "") -> str:
    """Three significant figures; a missing one says why."""
    if x is None:
        return reason or "–"
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:#.3g}".rstrip(".")


def check_table(checks: Sequence[dict]) -> Table:
    """Errors of each backend inside the reference transformer, with the limits and the verdict."""

    def against(error: float | None, limit: float | None) -> str:
        if error is None or limit is None:
            return "–"
        return f"{error:.1e} {'≤' if error <= limit else '>'} {limit:.1e}"

    rows = [
        [
            c["model"],
            c["size"],
            "naive" if c["backend"] == "reference" else c["backend"],
            c["dtype"],
            against(c["output_error"], c["output_limit"]),
            against(c["gradient_error"], c["gradient_limit"]),
            c["gradient"] or "–",
            c["verdict"],
        ]
        for c in checks
    ]
    headers = [
        "model",
        "size",
        "backend",
        "dtype",
        "output error, limit",
        "gradient error, limit",
        "of parameter",
        "verdict",
    ]
    return Table(
        "check",
        headers,
        rows,
        (
            "Error against float64 ≤ limit, as fractions of the largest value; limit: 2 × the naive error + 8 eps. "
            "Every parameter's gradient is checked; worst is the one nearest its limit.",
        ),
    )


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Rows by (case, dtype, direction), then by contender."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.dtype, row.direction), {})[row.contender] = row
    return found


def baseline(contenders: Sequence[str]) -> str | None:
    """Whose time the ratios are to: the first of torch's."""
    return next((name for name in contenders if name.startswith("torch")), None)


def ratio_table(suite: str, rows: Sequence[Row]) -> Table:
    """Times side by side, each with torch's time over its own: above 1.00 is faster than torch."""
    rows = [row for row in rows if row.suite == suite]
    contenders = [name for name in distinct(row.contender for row in rows) if not name.startswith("peak")]
    notes = []
    for name in list(contenders):
        reasons = {row.blank.get("median_ms") for row in rows if row.contender == name}
        if len(reasons) == 1 and None not in reasons:
            contenders.remove(name)
            notes.append(f"{name}: {reasons.pop()}")
    base = baseline(contenders)
    body = []
    for (case, dtype, direction), group in _groups(rows).items():
        cells = [case, dtype, direction]
        reference = group[base].median_ms if base in group else None
        for name in contenders:
            row = group.get(name)
            if row is None or row.median_ms is None:
                cells.append("–" if row is None else row.blank.get("median_ms", "–"))
                continue
            ratio = f" ({reference / row.median_ms:.2f}×)" if reference else ""
            cells.append(f"{_number(row.median_ms)}{ratio}")
        body.append(cells)
    if base:
        notes.insert(0, f"Median ms; in brackets the time of {base} over this one: above 1 is faster than it.")
    return Table(suite, ["case", "dtype", "direction", *contenders], body, tuple(notes))


def full_table(rows: Sequence[Row]) -> Table:
    """Every figure of every row."""
    headers = ["suite", "case", "dtype", "direction", "contender", "median ms", "p20–p80", "GFLOP/s", "% of matmul"]
    headers += ["GB/s", "% of copy", "peak MiB", "max error"]
    body = []
    for row in rows:
        blank = row.blank
        spread = "–" if row.p20_ms is None else f"{_number(row.p20_ms)}–{_number(row.p80_ms)}"
        body.append(
            [
                row.suite,
                row.case,
                row.dtype,
                row.direction,
                row.contender,
                _number(row.median_ms, blank.get("median_ms", "")),
                spread,
                _number(row.gflops, blank.get("gflops", "")),
                _number(row.matmul_percent),
                _number(row.gbytes, blank.get("gbytes", "")),
                _number(row.copy_percent),
                _number(row.peak_memory_mib, blank.get("peak_memory_mib", "")),
                "–" if row.max_error is None else f"{row.max_error:.1e}",
            ]
        )
    return Table("All figures", headers, body)


def machine_lines(results: Results) -> list[str]:
    """The machine in a few lines: what was measured on, with what, by which command."""
    m = results.machine
    versions = ", ".join(f"{k} {m[k]}" for k in ("python", "torch", "triton", "fastattn", "cuda", "driver") if m.get(k))
    ceilings = ", ".join(
        f"{name} {value:.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}" for name, value in m.get("ceilings", {}).items()
    )
    lines = [
        f"device: {m['device']} ({m['threads']} threads, {m['cpu_capability']})",
        f"versions: {versions}",
        f"commit: {m.get('commit') or 'unknown'}, {m.get('date', '')}",
        f"command: {m['command']}",
    ]
    return [*lines, f"ceilings measured here: {ceilings}"] if ceilings else lines


def suites_of(results: Results) -> list[str]:
    return distinct(row.suite for row in results.rows)


def tables(results: Results) -> list[Table]:
    """The tables worth reading first."""
    found = [check_table(results.checks)] if results.checks else []
    return found + [table for suite in suites_of(results) for table in suite_tables(suite, results.rows)]


def suite_tables(suite: str, rows: Sequence[Row]) -> list[Table]:
    further = [target_table(rows), accuracy_table(rows)] if suite == "cpu" else []
    return [ratio_table(suite, rows), *further]


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write ``report.md`` and, where attention was timed, ``attention.png``; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    page = ["# Benchmark report", "", *(f"- {line}" for line in machine_lines(results)), ""]
    page += [table.markdown() for table in tables(results)]
    if results.rows:
        page.append(full_table(results.rows).markdown())
    written = [folder / "report.md"]
    written[0].write_text("\n".join(page))
    plotted = [r for r in results.rows if r.suite == "attention" and r.labels.get("plain") and r.gflops is not None]
    if plotted:
        written.append(folder / "attention.png")
        plot(plotted, results, written[-1])
    return written


def _panel(row: Row) -> tuple[str, int, str, bool]:
    return row.dtype, row.labels["head_dim"], row.direction, row.labels["causal"]


def plot(rows: Sequence[Row], results: Results, path: Path) -> None:
    """Speed against sequence length: a row of panels per dtype and head dimension, a column per direction and mask."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    down = distinct(_panel(row)[:2] for row in rows)
    across = sorted(distinct(_panel(row)[2:] for row in rows))
    contenders = distinct(row.contender for row in rows)
    colours = dict(zip(contenders, plt.get_cmap("tab10").colors, strict=False))
    large = results.machine["device_type"] == "cuda"
    unit, factor = ("TFLOP/s", 1e-3) if large else ("GFLOP/s", 1.0)
    figure, axes = plt.subplots(
        len(down), len(across), figsize=(3.2 * len(across) + 0.6, 2.5 * len(down) + 1), squeeze=False
    )
    for line, (dtype, head_dim) in zip(axes, down, strict=True):
        for axis, (direction, causal) in zip(line, across, strict=True):
            labels = {"head_dim": head_dim, "causal": causal}
            panel = [
                r for r in rows if (r.dtype, r.direction) == (dtype, direction) and labels.items() <= r.labels.items()
            ]
            if not panel:
                axis.set_axis_off()
                continue
            for name in contenders:
                points = sorted((r.labels["seqlen"], r.gflops * factor) for r in panel if r.contender == name)
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=colours.get(name), label=name, markersize=4)
            lengths = sorted({r.labels["seqlen"] for r in panel})
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [str(n) for n in lengths], minor=False)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set_title(f"{direction}, {'causal' if causal else 'full'}\n{dtype}, head_dim {head_dim}", fontsize=8)
            axis.tick_params(labelsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(unit, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("sequence length", fontsize=8)
    drawn = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(drawn.values(), drawn.keys(), loc="upper center", ncols=len(drawn), fontsize=9, frameon=False)
    about = f"{results.machine['device']}, {results.machine['threads']} threads, torch {results.machine['torch']}"
    figure.text(0.5, 0.005, about, ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 0.97))
    figure.savefig(path, dpi=110)
    plt.close(figure)
