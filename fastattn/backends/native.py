"""What the CPU and CUDA backends share: a spec and its tensors as the integers that ``fastattn._C`` takes."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.base import Tensors
from fastattn.spec import FP8, UNBOUNDED, AttentionSpec

#: The order of ``fastattn::DType`` in ``csrc/params.h``.
DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3, FP8: 4}

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
        float(spec.softcap),
        int(spec.relative_offset),
        spec.total_q if spec.packed else -1,
        spec.total_k if spec.packed and spec.page_size is None else -1,
        spec.page_size or 0,
        spec.num_pages,
        spec.num_splits,
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


def pack_table(x: Tensor | None) -> tuple[int, int, int]:
    """Pointer and strides of a one- or two-dimensional tensor; stride 0 where it has size 1, or no second dimension."""
    if x is None:
        return (0, 0, 0)
    first, second = (*x.stride(), 0)[:2]
    return (x.data_ptr(), 0 if x.shape[0] == 1 else first, second)


def pack_tables(t: Tensors) -> tuple[int, ...]:
    """The small tensors of the features beyond mask and bias, in the order of ``csrc/params.h``.

    Slopes of shape ``(heads_q,)`` are those of every batch entry.
    """
    slopes = t.alibi_slopes
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes.unsqueeze(0)
    return (
        *pack_table(slopes),
        *pack_table(t.sinks),
        *pack_table(t.q_segments),
        *pack_table(t.k_segments),
        *pack_table(t.prefix_lens),
        *pack_table(t.cu_seqlens_q),
        *pack_table(t.cu_seqlens_k),
        *pack_table(t.seqused_k),
        *pack_table(t.leftpad_k),
        *pack_table(t.block_table),
        *pack_table(t.q_descale),
        *pack_table(t.k_descale),
        *pack_table(t.v_descale),
    )


def forward_arguments(spec: AttentionSpec, t: Tensors, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    """The leading arguments of ``_C.*_forward`` and ``_C.*_backward``."""
    q, k, v, seed = t.q, t.k, t.v, t.dropout_seed
    return (
        pack_call(spec),
        0 if seed is None else seed.data_ptr(),
        (q.data_ptr(), *q.stride()),
        (k.data_ptr(), *k.stride()),
        (v.data_ptr(), *v.stride()),
        None if t.mask is None else pack_broadcast(t.mask),
        None if t.bias is None else pack_broadcast(t.bias),
        pack_tables(t) if spec.has_tables else None,
        (out.data_ptr(), *out.stride()),
        (lse.data_ptr(), *lse.stride(), 0),
    )


def backward_arguments(
    grad_out: Tensor, grad_lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None
) -> tuple[Any, ...]:
    """The arguments of ``_C.*_backward`` after those of :func:`forward_arguments`."""
    return (pack(grad_out), pack_rows(grad_lse), pack(dq), pack(dk), pack(dv), pack(dbias))
