"""``python -m benchmarks``: which backends run here, are they right, how fast are they beside torch.

    python -m benchmarks                            everything: the check on text, then every timing suite
    python -m benchmarks check --text book.txt      the check alone, on a text of your own
    python -m benchmarks attention calls            some suites
    python -m benchmarks cpu --full                 the CPU kernels against their targets, on the whole grid
    python -m benchmarks report results.json        tables and plot anew from rows
    python -m benchmarks tune                       Triton's configs and variants, on a GPU, beside torch's kernels

Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

SUITES = ("check", "attention", "module", "transformer", "calls", "cpu")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", default=["all"], help=f"all, {', '.join(SUITES)}; or report, followed by result files"
    )
    parser.add_argument("--text", type=Path, help="text to check on (default: the project's documentation)")
    parser.add_argument("--out", type=Path, help="folder for results (default: benchmarks/out)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where torch sees a GPU)")
    parser.add_argument("--quick", action="store_true", help="one small case per suite: does it run, not how fast")
    parser.add_argument("--full", action="store_true", help="suite cpu: the whole grid, minutes, not a choice of it")
    parsed = parser.parse_args(arguments)
    if parsed.what[0] == "report":
        if len(parsed.what) == 1:
            parser.error("report needs a results.json")
        return parsed
    if parsed.what == ["tune"]:
        return parsed
    unknown = sorted(set(parsed.what) - {*SUITES, "all"})
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; there are {', '.join(SUITES)} and all")
    if parsed.text is not None and not parsed.text.is_file():
        parser.error(f"--text: there is no file {parsed.text}")
    parsed.what = list(SUITES) if "all" in parsed.what else [suite for suite in SUITES if suite in parsed.what]
    return parsed


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    # Without a GPU, Triton's kernels run in its interpreter; Triton reads this when it is first imported.
    gpu = torch.cuda.is_available()
    if not gpu and importlib.util.find_spec("triton") is not None:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.what[0] == "report":
        return _report(options)
    device = torch.device(options.device or ("cuda" if gpu else "cpu"))
    if options.what == ["tune"]:
        from benchmarks.tune import run as tune

        return tune(options.out or Path(__file__).parent / "out", device, options.quick, list(arguments))
    from benchmarks.session import run

    return run(options, device, arguments)


def _report(options: argparse.Namespace) -> int:
    from benchmarks.report import make_console, tables, write_report
    from benchmarks.rows import Results

    for name in options.what[1:]:
        path = Path(name)
        results = Results.load(path)
        for table in tables(results):
            make_console().print(table.rich())
        for written in write_report(results, options.out or path.parent):
            print(f"written: {written}")
    return 0


if __name__ == "__main__":
    started = time.perf_counter()
    status = main(sys.argv[1:])
    print(f"{time.perf_counter() - started:.0f} s")
    sys.exit(status)
