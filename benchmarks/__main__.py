"""``python -m benchmarks``: which backends run here, are they right, how fast are they beside torch.

    python -m benchmarks                            everything: the check on text, then every timing suite
    python -m benchmarks check --text book.txt      the check alone, on a text of your own
    python -m benchmarks attention calls            some suites
    python -m benchmarks cpu --full                 the CPU kernels against their targets, on the whole grid
    python -m benchmarks report results.json        tables and plot anew from rows
    python -m benchmarks tune --seconds 540         Triton's configs, on a GPU, beside FlexAttention and torch's FLASH
    python -m benchmarks cuda --seconds 240         CUDA kernels and their variants, on a GPU, beside cuDNN and FA3
    python -m benchmarks e4m3                       errors of attention on 8-bit floats
    python -m benchmarks order results.json         who is asked first on a GPU: fastattn/measured.py, from rows

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
        "what",
        nargs="*",
        default=["all"],
        help=f"all, {', '.join(SUITES)}; tune; cuda; e4m3; or report or order, then files",
    )
    parser.add_argument("--text", type=Path, help="text to check on (default: the project's documentation)")
    parser.add_argument("--out", type=Path, help="folder for results (default: benchmarks/out)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where torch sees a GPU)")
    parser.add_argument("--quick", action="store_true", help="one small case per suite: does it run, not how fast")
    parser.add_argument("--seconds", type=float, default=240.0, help="of cuda, tune: what the whole run may take (240)")
    parser.add_argument("--full", action="store_true", help="suite cpu: the whole grid, minutes, not a choice of it")
    parsed = parser.parse_args(arguments)
    if parsed.what[0] in ("report", "order"):
        if len(parsed.what) == 1:
            parser.error(f"{parsed.what[0]} needs a results.json")
        for name in parsed.what[1:]:
            _check_results(parser, Path(name))
        return parsed
    _check_device(parser, parsed.device)
    if parsed.what in (["tune"], ["cuda"], ["e4m3"]):
        return parsed
    unknown = sorted(set(parsed.what) - {*SUITES, "all"})
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; there are {', '.join(SUITES)} and all")
    if parsed.text is not None and not parsed.text.is_file():
        parser.error(f"--text: there is no file {parsed.text}")
    parsed.what = list(SUITES) if "all" in parsed.what else [suite for suite in SUITES if suite in parsed.what]
    if parsed.text is not None and "check" not in parsed.what:
        parser.error("--text is what check reads, and check is not among the suites")
    if parsed.out is not None:
        try:  # now, not after minutes of timing
            parsed.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out: {error}")
    return parsed


def _check_results(parser: argparse.ArgumentParser, path: Path) -> None:
    from benchmarks.rows import Results

    try:
        Results.load(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"{path} is no results.json of this program: {type(error).__name__}: {error}")


def _check_device(parser: argparse.ArgumentParser, name: str | None) -> None:
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        parser.error(f"--device must be cpu or cuda, got {name}")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    # Without a GPU, Triton's kernels run in its interpreter; Triton reads this when it is first imported.
    gpu = torch.cuda.is_available()
    if not gpu and importlib.util.find_spec("triton") is not None:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.what[0] == "report":
        return _report(options)
    if options.what[0] == "order":
        from benchmarks.order import run as order

        return order([Path(name) for name in options.what[1:]])
    device = torch.device(options.device or ("cuda" if gpu else "cpu"))
    if options.what == ["tune"]:
        from benchmarks.tune import run as tune

        out = options.out or Path(__file__).parent / "out"
        return tune(out, device, options.quick, options.seconds, list(arguments))
    if options.what == ["e4m3"]:
        from benchmarks.e4m3 import run as e4m3

        return e4m3(options.quick)
    if options.what == ["cuda"]:
        from benchmarks.cuda import run as cuda

        out = options.out or Path(__file__).parent / "out"
        return cuda(out, device, options.quick, options.seconds, list(arguments))
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
