"""CUDA C++ kernels, compiled when the package is installed where a CUDA compiler is found."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from fastattn.backends.base import Gradients, Tensors, empty_like_layout, empty_lse
from fastattn.backends.native import backward_arguments, forward_arguments, pack_call
from fastattn.spec import FP8, AttentionSpec

try:
    from fastattn import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR: str | None = str(error)
else:
    _IMPORT_ERROR = None

MAX_HEAD_DIM = 256
#: Of ``AttentionSpec.features()``, what the float32 kernels do not have.
TENSOR_CORES_ONLY = ("paged keys", "num_splits")
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


def _e4m3_reasons(spec: AttentionSpec) -> list[str]:
    """Why there is no kernel for such a call on e4m3 tensors as they are."""
    asked = {"a mask": spec.mask, "a bias": spec.bias, "dropout": spec.dropout_p}
    features = [*(name for name, wanted in asked.items() if wanted), *spec.features()]
    if spec.needs_grad or spec.needs_bias_grad:
        features.append("a gradient")
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    kernel = _C.cuda_e4m3_reason(pack_call(spec), device)
    return [*(f"{feature} with float8_e4m3fn" for feature in features), *filter(None, [kernel])]


def _in_chunks(x: Tensor) -> Tensor:
    """``x``, or a dense copy where its rows are not whole chunks of 16 e4m3 numbers, which is what TMA can step to."""
    steps = (stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1)
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


class CudaBackend:
    """float16 and bfloat16 on tensor cores, float32 without; summed in float32; head dimensions to ``MAX_HEAD_DIM``.

    float8_e4m3fn, forward only, on compute capability 9.0.

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
        if spec.dtype is torch.float32:
            reasons = [f"{feature} in float32: not yet" for feature in spec.features() if feature in TENSOR_CORES_ONLY]
        if torch.device(spec.device).type != "cuda":
            reasons.append(f"device {spec.device}: this backend runs on CUDA devices")
        elif self.unavailable_reason() is None and _capability(spec.device) < _lowest_capability():
            have = ".".join(map(str, _capability(spec.device)))
            reasons.append(f"compute capability {have}: the kernels were compiled for {_C.cuda_archs}")
        if spec.dtype is FP8:
            reasons += _e4m3_reasons(spec) if self.unavailable_reason() is None else []
        elif spec.dtype not in DTYPES:
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
        asked = {"mask": spec.mask, "bias": spec.bias}
        present = [*(name for name, shape in asked.items() if shape is not None), *spec.features()]
        parts = [_C.cuda_configuration(pack_call(spec), present, False)]
        if spec.needs_grad or spec.needs_bias_grad:
            parts.append(_C.cuda_configuration(pack_call(spec), present, True))
        return "; ".join([*dict.fromkeys(parts), "not yet run on a GPU"])

    def _stream(self, x: Tensor) -> int:
        return torch.cuda.current_stream(x.device).cuda_stream

    def _workspace(self, size: int, x: Tensor) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=x.device)

    def forward(self, spec: AttentionSpec, t: Tensors) -> tuple[Tensor, Tensor]:
        out = empty_like_layout(t.q, spec.head_dim_v)
        lse = empty_lse(t.q)
        if spec.dtype is FP8:
            t = t._replace(q=_in_chunks(t.q), k=_in_chunks(t.k), v=_in_chunks(t.v))
        device = t.q.get_device()
        workspace = self._workspace(_forward_workspace_bytes(spec, device), t.q)
        _C.cuda_forward(*forward_arguments(spec, t, out, lse), workspace.data_ptr(), device, self._stream(t.q))
        return out, lse

    def backward(
        self, spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        dq, dk, dv = empty_like_layout(t.q), empty_like_layout(t.k), empty_like_layout(t.v)
        dbias = None
        if spec.needs_bias_grad and t.bias is not None:
            dbias = torch.empty(t.bias.shape, dtype=t.bias.dtype, device=t.q.device)
        deterministic = torch.are_deterministic_algorithms_enabled()
        workspace = self._workspace(_C.cuda_backward_workspace_bytes(pack_call(spec), deterministic), t.q)
        _C.cuda_backward(
            *forward_arguments(spec, t, out, lse),
            *backward_arguments(grad_out, grad_lse, dq, dk, dv, dbias),
            workspace.data_ptr(),
            deterministic,
            t.q.get_device(),
            self._stream(t.q),
        )
        return dq, dk, dv, dbias
