"""Triton kernels for NVIDIA (sm_80 and later) and AMD GPUs, and for its interpreter on the CPU.

Importing this package imports no Triton. A call goes ``TritonBackend.forward`` -> ``launch.plan_forward`` ->
``forward.forward_kernel``. ``configs`` holds what kernels are compiled for and their tile sizes, ``sequences`` where
sequences lie and which tiles see each other, ``scores`` the shaping of scores, ``tiles`` loads, stores and products.

Every program owns what it writes: nothing is atomic and every result is bitwise reproducible. A feature that a call
does not use is not in its kernel, and no size but the head dims is: kernels are compiled once per set of features.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.backends.base import Gradients, Tensors
from fastattn.backends.triton.configs import INTERPRET, SMALLEST_BLOCK, config
from fastattn.spec import AttentionSpec

if TYPE_CHECKING:
    from fastattn.backends.triton.launch import Launch

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def architecture(device: str) -> str:
    """The row of the config table for a device, given as ``str(tensor.device)``."""
    if INTERPRET:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"  # its 64 KiB of local memory are what every AMD GPU has
    major, _ = torch.cuda.get_device_capability(device)
    # The table's sm_80 rows fit in the 99 KiB that sm_86, sm_89 and sm_120 have.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def version() -> tuple[int, ...]:
    """Triton's version, (major, minor), without importing it; () where it does not say."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ()


class TritonBackend:
    """The kernels of this package behind the protocol of :class:`fastattn.backends.base.Backend`."""

    name = "triton"

    def unavailable_reason(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if version() and version() < (3, 6):
            return f"triton {'.'.join(map(str, version()))}: at least 3.6"
        if not INTERPRET and not torch.cuda.is_available():
            return "no GPU (set TRITON_INTERPRET=1 before the import to interpret the kernels on the CPU)"
        return None

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        device = torch.device(spec.device)
        if device.type == "cuda" and version() in ((3, 6), (3, 7)) and architecture(spec.device) == "sm_100":
            reasons.append("sm_100: Triton 3.6 and 3.7 fail to compile the kernels for it; 3.8 and later do not")
        if device.type not in ("cuda", "cpu") or (device.type == "cpu" and not INTERPRET):
            reasons.append(f"device {spec.device}: Triton kernels need a GPU, or TRITON_INTERPRET=1 before the import")
        elif device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(device)
            if major < 8:
                reasons.append(f"compute capability {major}.{minor}: Triton kernels need 8.0 or later")
        if spec.dtype not in _DTYPES:
            name = str(spec.dtype).removeprefix("torch.")
            reasons.append(f"dtype {name}: Triton kernels take float16, bfloat16 and float32")
        for name, dim, most in (("head_dim_qk", spec.head_dim_qk, 576), ("head_dim_v", spec.head_dim_v, 512)):
            if dim > most:
                reasons.append(f"{name} {dim}: at most {most}, a tile has to fit in registers")
        longest = max(spec.seqlen_q, spec.seqlen_k)
        if spec.seqlen_q + spec.seqlen_k >= 2**30:
            reasons.append(f"seqlen_q {spec.seqlen_q} + seqlen_k {spec.seqlen_k}: positions are 32-bit, at most 2^30")
        # 2^31 programs on NVIDIA; AMD counts threads in 32 bits, 512 of them to a program.
        programs, limit = spec.batch * spec.heads_q * (longest // SMALLEST_BLOCK + 1), 2**31
        if spec.needs_bias_grad and spec.bias is not None:
            programs *= spec.bias[3] // SMALLEST_BLOCK + 1
        if torch.version.hip is not None:
            limit = 2**23
        if programs >= limit:
            reasons.append(f"{programs} tiles of {SMALLEST_BLOCK} rows: a grid has fewer than {limit}")
        return reasons

    def configuration(self, spec: AttentionSpec) -> str:
        from fastattn.backends.triton.launch import bits, features, strategy

        arch = architecture(spec.device)
        f = features(spec, arch == "gfx942")
        tiles = [f"forward {strategy(spec, arch)}"]
        if spec.needs_grad or spec.needs_bias_grad:
            kernels = ["dkdv", "dq", *(["dbias"] if spec.needs_bias_grad else [])]
            tiles += [f"{kernel} {config(arch, bits(spec), f, kernel)}" for kernel in kernels]
        return f"Triton, {arch}, {f.describe()}: {'; '.join(tiles)}"

    def forward(self, spec: AttentionSpec, t: Tensors) -> tuple[Tensor, Tensor]:
        from fastattn.backends.triton.launch import plan_forward

        out, lse, launches = plan_forward(spec, architecture(str(t.q.device)), t)
        _run(launches, t.q.device)
        return out, lse

    def backward(
        self, spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        from fastattn.backends.triton.launch import plan_backward

        arch = architecture(str(t.q.device))
        gradients, launches = plan_backward(spec, arch, t, grad_out, grad_lse, out, lse)
        _run(launches, t.q.device)
        return gradients


def _run(launches: Iterable[Launch], device: torch.device) -> None:
    """On the current stream of the tensors' device, which need not be the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch.run()
