"""The CUDA backend on the emulator: CPU tensors, and only the memory of those tensors."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.backends import cuda
from fastattn.backends.base import Gradients, Tensors
from fastattn.spec import AttentionSpec
from tests.cuda_emulation.build import ROOT, load


@dataclass(frozen=True)
class Statistics:
    """Counts since they were last asked for."""

    mma: int
    ldmatrix: int
    ldmatrix_conflicts: int
    shared_accesses: int
    shared_conflicts: int
    switches: int
    wgmma: int
    bulk_copies: int
    cp_async: int


class Emulator:
    """The emulator inside a module that :func:`tests.cuda_emulation.build.load` built."""

    def __init__(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        self.module = module
        self.library = ctypes.CDLL(module.__file__)

    def configure(self, seed: int = 0, resident: int = 4, count_banks: bool = False) -> None:
        """The order of warps (0: first come, first served; 1: last come; others: random) and blocks at a time."""
        self.library.fastattn_emulation_configure(seed, resident, int(count_banks))

    def statistics(self) -> Statistics:
        counts = (ctypes.c_uint64 * 9)()
        self.library.fastattn_emulation_statistics(counts)
        return Statistics(*counts)

    def register(self, x: Tensor, name: str, writable: bool = False, initialised: bool = True) -> None:
        """Lets kernels read ``x``, and write it where writable; one that is not initialised they must write first."""
        if x.numel() == 0:
            return
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        self.library.fastattn_emulation_register(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_size_t(reach * x.element_size()),
            x.element_size(),
            int(writable),
            int(initialised),
            name.encode(),
        )

    def forget(self) -> None:
        self.library.fastattn_emulation_forget()

    @contextmanager
    def memory(self, **inputs: Any) -> Iterator[None]:
        """While this is active, kernels may read the inputs, and write what is allocated meanwhile."""
        self.forget()
        for name, x in inputs.items():
            if isinstance(x, Tensor):
                self.register(x, name)
        try:
            with _Allocations(self):
                yield
        finally:
            self.forget()


class _Allocations(TorchDispatchMode):
    """Registers every tensor that torch allocates, as something that kernels may write."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self._emulator = emulator
        self._kept: list[Tensor] = []  # so that no two have the same address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (isinstance(result, Tensor) and "empty" in name) or name in ("zeros", "zeros_like", "full", "new_zeros"):
            self._kept.append(result)
            if "empty" in name and result.is_floating_point():
                result.fill_(math.nan)  # an element that no kernel writes shows
            label = f"output {len(self._kept)} {tuple(result.shape)}"
            self._emulator.register(result, label, writable=True, initialised="empty" not in name)
        elif name in ("zero_", "fill_", "copy_"):
            self._emulator.register(args[0], f"filled {tuple(args[0].shape)}", writable=True)
        return result


class EmulatedBackend(cuda.CudaBackend):
    """The CUDA backend with CPU tensors."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self.emulator = emulator

    def unavailable_reason(self) -> str | None:
        return None

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        return [reason for reason in super().unsupported_reasons(spec) if not reason.startswith("device")]

    def _stream(self, x: Tensor) -> int:
        return 0

    def forward(self, spec: AttentionSpec, t: Tensors) -> tuple[Tensor, Tensor]:
        with self.emulator.memory(**t._asdict()):
            return super().forward(spec, t)

    def backward(
        self, spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        with self.emulator.memory(**t._asdict(), grad_out=grad_out, grad_lse=grad_lse, out=out, lse=lse):
            return super().backward(spec, t, grad_out, grad_lse, out, lse)


@functools.cache
def emulated_backend() -> EmulatedBackend:
    """The CUDA backend of this process, its kernels emulated from now on."""
    (ROOT / "build").mkdir(exist_ok=True)
    with Path(ROOT / "build" / "cuda-emulation.lock").open("w") as lock:  # pytest -n: one process builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        module = load()
    cuda._C = module
    return EmulatedBackend(Emulator(module))
