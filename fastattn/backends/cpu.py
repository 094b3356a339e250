"""Tiled C++ kernels for the CPU, compiled per instruction set and chosen at run time."""

from __future__ import annotations

from os import getpid

import torch
from torch import Tensor

from fastattn.backends import PROCESS
from fastattn.backends.base import Gradients, Tensors, empty_like_layout, empty_lse
from fastattn.backends.native import backward_arguments, forward_arguments
from fastattn.spec import SUPPORTED_DTYPES, AttentionSpec, dtype_names

try:
    from fastattn import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR: str | None = str(error)
else:
    _IMPORT_ERROR = None
    if getpid() != PROCESS:  # torch's threads, if there were any, were not forked with it
        _C.cpu_leave_openmp()

MAX_HEAD_DIM = 576


class CpuBackend:
    """float16, bfloat16 (both computed in float32), float32 and float64; head dimensions up to ``MAX_HEAD_DIM``."""

    name = "cpu"

    def unavailable_reason(self) -> str | None:
        if _C is None:
            return f"the compiled kernels are missing ({_IMPORT_ERROR}); reinstall where there is a C++ compiler"
        return None

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = []
        if torch.device(spec.device).type != "cpu":
            reasons.append(f"device {spec.device}: this backend runs on the CPU")
        if spec.dtype not in SUPPORTED_DTYPES:
            reasons.append(f"dtype {dtype_names((spec.dtype,))}")
        for name in ("head_dim_qk", "head_dim_v"):
            if getattr(spec, name) > MAX_HEAD_DIM:
                reasons.append(f"{name} {getattr(spec, name)}: at most {MAX_HEAD_DIM}")
        return reasons

    def configuration(self, spec: AttentionSpec) -> str:
        return f"tiled C++ kernel, {_C.cpu_instruction_set()}, up to {torch.get_num_threads()} threads"

    def forward(self, spec: AttentionSpec, t: Tensors) -> tuple[Tensor, Tensor]:
        out = empty_like_layout(t.q, spec.head_dim_v)
        lse = empty_lse(t.q)
        arguments = forward_arguments(spec, t, out, lse)
        _C.cpu_forward(*arguments, torch.get_num_threads())
        return out, lse

    def backward(
        self, spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        dq, dk, dv = empty_like_layout(t.q), empty_like_layout(t.k), empty_like_layout(t.v)
        dbias = t.bias.new_empty(t.bias.shape) if spec.needs_bias_grad and t.bias is not None else None
        _C.cpu_backward(
            *forward_arguments(spec, t, out, lse),
            *backward_arguments(grad_out, grad_lse, dq, dk, dv, dbias),
            torch.get_num_threads(),
        )
        return dq, dk, dv, dbias
