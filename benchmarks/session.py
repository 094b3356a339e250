"""One run from beginning to end: backends, check, timing, results; with progress and an exit status."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import machine, suites
from benchmarks.cpu import cpu_jobs
from benchmarks.report import check_table, machine_lines, make_console, suite_tables, write_report
from benchmarks.rows import Results
from benchmarks.textcheck import check_text, interpreted, read_text
from fastattn import dispatch

DEFAULT_OUT = Path(__file__).resolve().parent / "out"


def run(options: argparse.Namespace, device: torch.device, arguments: Sequence[str]) -> int:
    """Run the suites named in ``options``; 0, or 1 if a check failed."""
    console = make_console()
    results = Results(machine.describe(device, arguments), [])
    for line in machine_lines(results):
        console.print(line, highlight=False)
    print_backends(console)
    failures: list[str] = []
    if "check" in options.what:
        failures += _check(console, results, read_text(options.text), device, options.quick)
    timed = [name for name in options.what if name != "check"]
    if timed:
        failures += _time(console, results, timed, device, options)

    out = options.out or DEFAULT_OUT
    results.save(out / "results.json")
    for path in (out / "results.json", *write_report(results, out)):
        console.print(f"written: {path}", highlight=False)
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red", highlight=False)
    console.print(f"{len(failures)} failures" if failures else "all checks passed", highlight=False)
    return 1 if failures else 0


def print_backends(console: Console) -> None:
    """Which backends can run on this machine, and why the others cannot."""
    console.print("\nbackends", style="bold")
    for name, backend in dispatch.backends().items():
        reason = backend.unavailable_reason()
        state = f"cannot run: {reason}" if reason else "runs"
        if not reason and interpreted(name):
            state = "runs in Triton's interpreter (no GPU here): checked, not timed"
        if name == "reference":
            state += " (the naive implementation)"
        console.print(f"  {name:<10} {state}", highlight=False)


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True)


def _check(console: Console, results: Results, text: bytes, device: torch.device, quick: bool) -> list[str]:
    console.print(f"\ncheck: reference transformer on {len(text)} bytes of text, token = byte", style="bold")
    verdicts = []
    with _progress(console) as progress:
        task = progress.add_task("check", total=None)
        for verdict in check_text(text, device, quick):
            verdicts.append(verdict)
            progress.update(task, advance=1, description=f"{verdict.backend} {verdict.dtype} in {verdict.model}")
    results.checks = [verdict.to_json() for verdict in verdicts]
    console.print(check_table(results.checks).rich())
    return [f"{v.backend} {v.dtype} in {v.model} ({v.size}): {v.complaint}" for v in verdicts if v.failed]


def _time(
    console: Console, results: Results, names: Sequence[str], device: torch.device, options: argparse.Namespace
) -> list[str]:
    quick, makers = options.quick, {**suites.SUITES, "cpu": partial(cpu_jobs, full=options.full)}
    jobs = [(name, job) for name in names for job in makers[name](device, quick)]
    console.print(f"\ntiming: {', '.join(names)}", style="bold")
    with _progress(console) as progress:
        task = progress.add_task("ceilings: a large matmul, a large copy", total=len(jobs))
        dtypes = suites.timed_dtypes(device)
        results.machine["ceilings"] = machine.ceilings(device, dtypes, quick)
        bench = suites.Bench(device, results.machine["ceilings"], quick)
        for at, (name, job) in enumerate(jobs):
            progress.update(task, description=job.title)
            try:
                results.rows += job.run(bench)
            except KeyboardInterrupt:  # hours may have been measured
                bench.failures.append(f"interrupted in {job.title}: {at} of {len(jobs)} jobs are in the results")
                break
            progress.advance(task)
            if at + 1 == len(jobs) or jobs[at + 1][0] != name:
                for table in suite_tables(name, results.rows):
                    progress.console.print(table.rich())
    return bench.failures
