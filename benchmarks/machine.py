"""The machine a measurement was made on: what it is, and the most it can do."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import time_calls


def _command(*argv: str) -> str | None:
    """The first line a command prints, or None where there is no such command or it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """The size of the first core's largest cache; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()):
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return max(sizes)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    commit = _command("git", "rev-parse", "HEAD")
    if commit and _command("git", "status", "--porcelain", "--untracked-files=no"):
        return commit + " with local changes"
    return commit


def describe(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """Device, versions, commit and command line: what a row needs to be believed or repeated."""
    about: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else None,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "fastattn": _version("fastattn"),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "command": "python -m benchmarks " + shlex.join(arguments),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    return about


def matmul_gflops(device: torch.device, dtype: torch.dtype, largest: int) -> float:
    """The best speed of square matmuls, doubled in size until one takes 50 ms (some CPUs have no fast bfloat16)."""
    best, size = 0.0, 256
    while size <= largest:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        sample = time_calls({"matmul": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, budget_s=0.3)
        best = max(best, 2 * size**3 / sample["matmul"].median_ms / 1e6)
        if sample["matmul"].median_ms > 50:
            break
        size *= 2
    return best


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool = False) -> dict[str, float]:
    """The speed of a large matmul per dtype (``matmul float32``, GFLOP/s) and of a large copy (``copy``, GB/s).

    A copy of n bytes counts 2n: n read, n written.
    """
    large = device.type == "cuda"
    largest = 256 if quick else 8192 if large else 2048
    found = {"matmul " + str(dtype).removeprefix("torch."): matmul_gflops(device, dtype, largest) for dtype in dtypes}
    count = ((1 << 30) if large else (1 << 27)) // (8 if quick else 1)
    source = torch.empty(count, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    sample = time_calls({"copy": lambda: target.copy_(source)}, device, budget_s=0.7)
    found["copy"] = 2 * count / sample["copy"].median_ms / 1e6
    return found
