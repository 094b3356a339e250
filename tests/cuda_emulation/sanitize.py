"""The CUDA kernels under NVIDIA's compute-sanitizer, on a GPU: bounds, alignment, uninitialised reads, races.

    python -m tests.cuda_emulation.sanitize [--tools memcheck racecheck] [--cases plain d64] [--out benchmarks/out]

Small calls that reach every kernel and every row of the tables of tiles, forward and backward, dQ in one order and by
atomics; where there are Hopper kernels, once with and once without them. A row for each tool and type goes to
``sanitizer.json`` in the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.cases import CASES
from tests.cuda_emulation import hopper_cases
from tests.cuda_emulation.build import ROOT
from tests.cuda_emulation.shapes import SHAPES, SIMT_SHAPES
from tests.fp8 import Quantised

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
NAMES = (
    "plain window gqa mask_blind_rows bias_shared_heads bias_mask_causal dropout_causal_gqa layout_strided sinks "
    "packed_causal packed_used paged_used_causal splits"
)
EIGHT_BITS = torch.float8_e4m3fn
#: Type -> cases by name; on e4m3 those of the kernel for it.
KNOWN = {
    dtype: {case.name: case for case in found}
    for dtype, found in {
        torch.bfloat16: [*CASES, *SHAPES, *hopper_cases.CASES, *hopper_cases.DECODE],
        torch.float16: [*CASES, *SHAPES, *hopper_cases.CASES, *hopper_cases.DECODE],
        torch.float32: [*CASES, *SIMT_SHAPES],
        EIGHT_BITS: hopper_cases.FP8,
    }.items()
}
MADE_FOR_KERNELS = [*SHAPES, *SIMT_SHAPES, *hopper_cases.CASES, *hopper_cases.DECODE, *hopper_cases.FP8]
DEFAULT_CASES = list(dict.fromkeys([*NAMES.split(), *(case.name for case in MADE_FOR_KERNELS)]))
ERROR = 86  # the tool's exit code where it found something
SECONDS = 1200
SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)", re.M)


def find_tool() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [str(Path(home) / "bin") for home in [*homes, "/usr/local/cuda"]]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def found(said: str) -> int | None:
    """How many errors or hazards the tool's summary speaks of; None where there is no summary."""
    counts = [int(errors or hazards) for errors, hazards in SUMMARY.findall(said)]
    return max(counts) if counts else None


def run_cases(dtype: torch.dtype, names: list[str], device: str = "cuda") -> None:
    """What the tool watches: every call that the backend takes, once with dQ in one order and once by atomics."""
    import fastattn
    from fastattn.dispatch import get_backend

    hopper = dtype is not torch.float32 and (device != "cuda" or torch.cuda.get_device_capability() == (9, 0))
    for name in filter(KNOWN[dtype].__contains__, names):
        if dtype is EIGHT_BITS:
            Quantised.of(KNOWN[dtype][name].make(torch.bfloat16, device)).run(backend="cuda")
            continue
        inputs = KNOWN[dtype][name].make(dtype, device)
        if get_backend("cuda").unsupported_reasons(inputs.spec()):
            continue
        for kernels, deterministic in itertools.product(("sm90", "sm80") if hopper else ("sm80",), (True, False)):
            os.environ["FASTATTN_CUDA_KERNELS"] = kernels  # looked at in every call
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            inputs.run(fastattn.attention, backend="cuda")
    if device == "cuda":
        torch.cuda.synchronize()


def watch(tool: str, name: str, dtype: torch.dtype, names: list[str]) -> dict[str, Any]:
    """One row."""
    kind = str(dtype).removeprefix("torch.")
    child = [sys.executable, "-m", "tests.cuda_emulation.sanitize", "--child", kind, "--cases", *names]
    command = [tool, "--tool", name, "--error-exitcode", str(ERROR), *child]
    # Each tensor an allocation of its own, so that what lies beyond its end is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"tool": name, "dtype": kind, "cases": names, "errors": None, "said": f"more than {SECONDS} s"}
    said = done.stdout + done.stderr
    errors = found(said)
    clean = errors == 0 and done.returncode == 0
    return {"tool": name, "dtype": kind, "cases": names, "errors": errors, "said": "" if clean else said[-4000:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS[:3]))
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_cases(getattr(torch, options.child), options.cases)
        return 0
    tool = find_tool()
    if tool is None:
        print("no compute-sanitizer in CUDA_HOME/bin, /usr/local/cuda/bin or on PATH: it comes with the CUDA toolkit")
        return 1
    if not torch.cuda.is_available():
        print("torch sees no GPU: nothing to watch")
        return 1
    from benchmarks.machine import describe

    rows = []
    for name in options.tools:
        for dtype in KNOWN:
            if dtype is EIGHT_BITS and torch.cuda.get_device_capability() != (9, 0):
                continue
            rows.append(watch(tool, name, dtype, list(dict.fromkeys(options.cases))))
            print(f"{name} {rows[-1]['dtype']}: {rows[-1]['errors']} errors\n{rows[-1]['said']}", flush=True)
    path = options.out / "sanitizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = describe(torch.device("cuda"), sys.argv[1:])
    machine["command"] = " ".join(["python -m tests.cuda_emulation.sanitize", *sys.argv[1:]])
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(path)
    return 0 if all(row["errors"] == 0 and not row["said"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
