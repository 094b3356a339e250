"""What the CPU and CUDA backends share: a spec and its tensors as the integers that ``fastattn._C`` takes."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastattn.spec import UNBOUNDED, AttentionSpec

#: The order of ``fastattn::DType`` in ``csrc/params.h``.
DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}

Packed = tuple[int, ...] | None


@functools.lru_cache(maxsize=1024)
def pack_call(spec: AttentionSpec) -> tuple[float, ...]:
    """What all calls of one spec have in common, in the order in which ``csrc/bindings.cpp`` reads it."""
    left, right = (UNBOUNDED if side is None else min(side, UNBOUNDED) for side in spec.window)
    p = spec.dropout_p
    return (
        DTYPE_CODES[spec.dtype],
        DTYPE_CODES[spec.bias_dtype or spec.dtype],
        spec.batch,
        spec.heads_q,
        spec.heads_k,
        spec.seqlen_q,
        spec.seqlen_k,
        spec.head_dim_qk,
        spec.head_dim_v,
        float(spec.softmax_scale),
        left,
        right,
        spec.offset,
        math.floor(p * 2**32),
        0.0 if p == 1.0 else 1.0 / (1.0 - p),
        *(spec.bias or (1, 1, 1, 1)),
    )


def pack(x: Tensor | None) -> Packed:
    """Pointer and strides of a four-dimensional tensor."""
    return None if x is None else (x.data_ptr(), *x.stride())


def pack_rows(x: Tensor | None) -> Packed:
    """Pointer and strides of a ``(batch, heads, seqlen_q)`` tensor such as lse; the fourth stride is unused."""
    return None if x is None else (x.data_ptr(), *x.stride(), 0)


def pack_broadcast(x: Tensor | None) -> Packed:
    """Pointer and strides of a mask or bias: stride 0 where it has size 1, so that it is read as if expanded."""
    if x is None:
        return None
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (x.data_ptr(), *strides)


def forward_arguments(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Any, ...]:
    """The leading arguments of ``_C.*_forward`` and ``_C.*_backward``."""
    return (
        pack_call(spec),
        0 if dropout_seed is None else dropout_seed.data_ptr(),
        (q.data_ptr(), *q.stride()),
        (k.data_ptr(), *k.stride()),
        (v.data_ptr(), *v.stride()),
        None if mask is None else pack_broadcast(mask),
        None if bias is None else pack_broadcast(bias),
        (out.data_ptr(), *out.stride()),
        (lse.data_ptr(), *lse.stride(), 0),
    )


def backward_arguments(
    grad_out: Tensor, grad_lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None
) -> tuple[Any, ...]:
    """The arguments of ``_C.*_backward`` after those of :func:`forward_arguments`."""
    return (pack(grad_out), pack_rows(grad_lse), pack(dq), pack(dk), pack(dv), pack(dbias))
