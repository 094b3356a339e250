"""CUDA C++ kernels, compiled when the package is installed where a CUDA compiler is found."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from fastattn.backends.base import Gradients, Tensors, empty_like_layout, not_yet
from fastattn.backends.native import backward_arguments, forward_arguments
from fastattn.spec import AttentionSpec

try:
    from fastattn import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR: str | None = str(error)
else:
    _IMPORT_ERROR = None

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.lru_cache(maxsize=64)
def _capability(device: str) -> tuple[int, int]:
    return torch.cuda.get_device_capability(torch.device(device))


def _lowest_capability() -> tuple[int, int]:
    """Of the architectures that the kernels were compiled for; PTX of this one runs on all newer devices."""
    lowest = min(int(re.sub(r"\D", "", arch)) for arch in _C.cuda_archs.split(","))
    return divmod(lowest, 10)


class CudaBackend:
    """float16, bfloat16 and float32, all computed in float32; head dimensions up to ``MAX_HEAD_DIM``."""

    name = "cuda"

    def unavailable_reason(self) -> str | None:
        if _C is None:
            return f"the compiled kernels are missing ({_IMPORT_ERROR}); reinstall where there is a C++ compiler"
        if not _C.has_cuda:
            return (
                "built without CUDA kernels; reinstall where there is a CUDA compiler (FASTATTN_CUDA=1 insists on it)"
            )
        if torch.version.cuda is None:
            return "torch is not a CUDA build"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        reasons = not_yet(spec)
        if torch.device(spec.device).type != "cuda":
            reasons.append(f"device {spec.device}: this backend runs on CUDA devices")
        elif self.unavailable_reason() is None and _capability(spec.device) < _lowest_capability():
            have = ".".join(map(str, _capability(spec.device)))
            reasons.append(f"compute capability {have}: the kernels were compiled for {_C.cuda_archs}")
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype {str(spec.dtype).removeprefix('torch.')}: float16, bfloat16 and float32 only")
        if spec.bias_dtype is not None and spec.bias_dtype not in DTYPES:
            reasons.append(f"bias dtype {str(spec.bias_dtype).removeprefix('torch.')}")
        for name in ("head_dim_qk", "head_dim_v"):
            if getattr(spec, name) > MAX_HEAD_DIM:
                reasons.append(f"{name} {getattr(spec, name)}: at most {MAX_HEAD_DIM}")
        return reasons

    def configuration(self, spec: AttentionSpec) -> str:
        return "general SIMT kernel (no tensor cores), tiles of 64 queries x 64 keys; not yet run on a GPU"

    def _stream(self, x: Tensor) -> int:
        return torch.cuda.current_stream(x.device).cuda_stream

    def forward(self, spec: AttentionSpec, t: Tensors) -> tuple[Tensor, Tensor]:
        out = empty_like_layout(t.q, spec.head_dim_v)
        lse = torch.empty((spec.batch, spec.heads_q, spec.seqlen_q), dtype=torch.float32, device=t.q.device)
        arguments = forward_arguments(spec, t, out, lse)
        _C.cuda_forward(*arguments, t.q.get_device(), self._stream(t.q))
        return out, lse

    def backward(
        self, spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        dq, dk, dv = empty_like_layout(t.q), empty_like_layout(t.k), empty_like_layout(t.v)
        dbias = None
        if spec.needs_bias_grad and t.bias is not None:
            dbias = torch.empty(t.bias.shape, dtype=t.bias.dtype, device=t.q.device)
        delta = torch.empty((spec.batch, spec.heads_q, spec.seqlen_q), dtype=torch.float32, device=t.q.device)
        _C.cuda_backward(
            *forward_arguments(spec, t, out, lse),
            *backward_arguments(grad_out, grad_lse, dq, dk, dv, dbias),
            delta.data_ptr(),
            t.q.get_device(),
            self._stream(t.q),
        )
        return dq, dk, dv, dbias
