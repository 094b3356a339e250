"""The processor's peaks, from the loops of ``peaks.cpp``, compiled when first asked for."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("peaks.cpp")
#: Rounds of a loop: about a millisecond, beside which waking threads is little.
ROUNDS = {"fma": 100_000, "vdpbf16": 150_000, "amx": 25_000}


@cache
def library() -> ctypes.CDLL | str:
    """The compiled loops, or why there are none."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler ({compiler[0]})"
    target = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peaks.so"
        flags = ["-O3", "-std=c++17", target, "-shared", "-fPIC", "-pthread"]
        command = [*compiler, *flags, str(SOURCE), "-ldl", "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
            return f"{shlex.join(command[:-4])}: {first}"
        loaded = ctypes.CDLL(str(path))
    for name in ("fma", "vdpbf16", "amx", "read"):
        getattr(loaded, f"peak_{name}").restype = ctypes.c_int64
    return loaded


def arithmetic_peak(name: str) -> tuple[Callable[[], int], int] | str:
    """A call that does nothing but ``fma`` (float32), ``vdpbf16`` or ``amx``, and how many operations it does."""
    loops = library()
    if isinstance(loops, str):
        return loops
    call = partial(getattr(loops, f"peak_{name}"), torch.get_num_threads(), ctypes.c_int64(ROUNDS[name]))
    return (call, call()) if call() else f"this processor has no {name}"


def read_peak(k: Tensor, v: Tensor) -> tuple[Callable[[], int], int] | str:
    """A call that does nothing but read ``k`` and ``v``, contiguous and of one size; and the bytes it reads."""
    loops = library()
    if isinstance(loops, str):
        return loops
    assert k.is_contiguous() and v.is_contiguous() and k.nbytes == v.nbytes
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (k, v))
    call = partial(loops.peak_read, torch.get_num_threads(), *pointers, ctypes.c_int64(k.nbytes))
    return call, call()
