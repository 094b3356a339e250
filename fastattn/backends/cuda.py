"""CUDA C++ kernels, compiled when the package is installed where a CUDA compiler is found."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from fastattn.backends.base import Gradients, empty_like_layout
from fastattn.backends.native import backward_arguments, forward_arguments, pack_call
from fastattn.spec import AttentionSpec

try:
    from fastattn import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR: str | None = str(error)
else:
    _IMPORT_ERROR = None

MAX_HEAD_DIM = 256
MAX_SEQLEN = 2**30 - 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.lru_cache(maxsize=64)
def _capability(device: str) -> tuple[int, int]:
    return torch.cuda.get_device_capability(torch.device(device))


def _lowest_capability() -> tuple[int, int]:
    """Of the architectures that the kernels were compiled for; PTX of this one runs on all newer devices."""
    lowest = min(int(re.sub(r"\D", "", arch)) for arch in _C.cuda_archs.split(","))
    return divmod(lowest, 10)


@functools.lru_cache(maxsize=1024)
def _forward_workspace_bytes(spec: AttentionSpec, device: int) -> int:
    return _C.cuda_forward_workspace_bytes(pack_call(spec), device)


class CudaBackend:
    """float16 and bfloat16 on tensor cores, float32 without; summed in float32; head dimensions to ``MAX_HEAD_DIM``.

    dQ of the 16-bit types is summed by atomics, in an order that differs from run to run, unless
    ``torch.use_deterministic_algorithms`` asks for one order; everything else always has one.
    """

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
        reasons = []
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
        for name in ("seqlen_q", "seqlen_k"):
            if getattr(spec, name) > MAX_SEQLEN:
                reasons.append(f"{name} {getattr(spec, name)}: at most {MAX_SEQLEN}")
        return reasons

    def configuration(self, spec: AttentionSpec) -> str:
        if _C is None or not _C.has_cuda:
            return "not built"
        call, has_mask, has_bias = pack_call(spec), spec.mask is not None, spec.bias is not None
        parts = [_C.cuda_configuration(call, has_mask, has_bias, False)]
        if spec.needs_grad or spec.needs_bias_grad:
            parts.append(_C.cuda_configuration(call, has_mask, has_bias, True))
        return "; ".join([*dict.fromkeys(parts), "not yet run on a GPU"])

    def _stream(self, x: Tensor) -> int:
        return torch.cuda.current_stream(x.device).cuda_stream

    def _workspace(self, size: int, x: Tensor) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=x.device)

    def forward(
        self,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        dropout_seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out = empty_like_layout(q, spec.head_dim_v)
        lse = torch.empty((spec.batch, spec.heads_q, spec.seqlen_q), dtype=torch.float32, device=q.device)
        arguments = forward_arguments(spec, q, k, v, mask, bias, dropout_seed, out, lse)
        workspace = self._workspace(_forward_workspace_bytes(spec, q.get_device()), q)
        _C.cuda_forward(*arguments, workspace.data_ptr(), q.get_device(), self._stream(q))
        return out, lse

    def backward(
        self,
        spec: AttentionSpec,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        dropout_seed: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> Gradients:
        dq, dk, dv = empty_like_layout(q), empty_like_layout(k), empty_like_layout(v)
        dbias = None
        if spec.needs_bias_grad and bias is not None:
            dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device)
        deterministic = torch.are_deterministic_algorithms_enabled()
        workspace = self._workspace(_C.cuda_backward_workspace_bytes(pack_call(spec), deterministic), q)
        _C.cuda_backward(
            *forward_arguments(spec, q, k, v, mask, bias, dropout_seed, out, lse),
            *backward_arguments(grad_out, grad_lse, dq, dk, dv, dbias),
            workspace.data_ptr(),
            deterministic,
            q.get_device(),
            self._stream(q),
        )
        return dq, dk, dv, dbias
