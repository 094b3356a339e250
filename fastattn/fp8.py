"""Attention on 8-bit floats, forward only: e4m3 tensors with one scale per key head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn import checks, ops
from fastattn.backends.base import Tensors
from fastattn.call import AttentionOptions, prepare_options, unfold
from fastattn.spec import FP8
from fastattn.validate import check_dense, check_descale, check_flag, check_length

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DTYPES = (FP8,)
_BEFORE_SCALES = Tensors._fields.index("q_descale") - Tensors._fields.index("mask")


def quantize_fp8(x: Tensor, heads: int | None = None) -> tuple[Tensor, Tensor]:
    """A tensor as e4m3 and one scale per head, so that ``x ≈ x_fp8 · descale``.

    ``descale = max |x| / 448`` over the head's ``(seq, head_dim)``, 448 being the largest e4m3 number; ``x / descale``
    is rounded to nearest: the relative error is at most 2⁻⁴, of entries below ``2⁻⁶ descale`` the absolute one
    ``2⁻¹⁰ descale``. (Per-tensor scaling of Micikevicius et al., "FP8 Formats for Deep Learning", 2022, by head.)

    Args:
        x: ``(..., heads, seq, head_dim)``, floating.
        heads: number of scales; each is shared by ``x.shape[-3] // heads`` neighbouring heads. The queries of grouped
            heads take the number of key heads: ``attention_fp8`` has one scale per key head. Default: one to a head.

    Returns:
        ``x_fp8`` of x's shape, float8_e4m3fn, and ``descale (..., heads)``, float32, positive. A NaN or infinity in x
        makes its whole head NaN.

    Raises:
        TypeError: x is not floating, or not dense; heads is no int.
        ValueError: fewer than three dimensions, or heads that ``heads`` does not divide.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    check_dense("x", x, x)
    if x.dim() < 3:
        raise ValueError(f"x must have at least 3 dimensions (..., heads, seq, head_dim), got shape {tuple(x.shape)}")
    number = x.shape[-3]
    if heads is not None and (check_length("heads", heads) == 0 or number % heads):
        raise ValueError(f"heads must divide the {number} heads of x, got {heads}")
    heads = number if heads is None else heads
    if x.numel() == 0:
        return x.to(FP8), torch.ones((*x.shape[:-3], heads), device=x.device)
    grouped = x.float().unflatten(-3, (heads, -1))
    largest = grouped.abs().amax((-3, -2, -1), keepdim=True)
    descale = (largest / torch.finfo(FP8).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (grouped / descale).flatten(-4, -3).to(FP8), descale[..., 0, 0, 0]


def attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastattn.attention` of ``query · q_descale``, ``key · k_descale`` and ``value · v_descale``, forward only.

    ::

        q8, q_descale = fastattn.quantize_fp8(q, heads=k.shape[1])
        (k8, k_descale), (v8, v_descale) = fastattn.quantize_fp8(k), fastattn.quantize_fp8(v)
        out = fastattn.attention_fp8(q8, k8, v8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)

    On a Hopper GPU the products are those of e4m3 tensor cores, whose second one rounds the attention weights to e4m3
    too (Shah et al., "FlashAttention-3", 2024, section 3.3); elsewhere the tensors are widened first, which is exact
    for key and value, and an ordinary kernel runs. :func:`fastattn.explain` says which: ``explain(attention_fp8, q8,
    k8, v8)``. The Hopper kernel has not yet run on a GPU.

    Args:
        query: ``(..., heads_q, seq_q, head_dim_qk)``, float8_e4m3fn, any strides.
        key: ``(..., heads_k, seq_k, head_dim_qk)``, likewise.
        value: ``(..., heads_k, seq_k, head_dim_v)``, likewise.
        q_descale: float32, positive: ``(..., heads_k)``, a scale for the query heads that share a key head, or one
            element for all; batch dimensions broadcast. Default: 1.
        k_descale: likewise. Default: 1.
        v_descale: likewise. Default: 1.
        return_lse: also return the natural log-sum-exp of the scores. Default: False.
        backend: as in :func:`fastattn.attention`.
        **options: mask, bias, causal, window, offset, softmax_scale, dropout_p, dropout_seed, softcap, alibi_slopes,
            sinks, q_segments, k_segments, prefix_lens: those of :func:`fastattn.attention`.

    Returns:
        ``(..., heads_q, seq_q, head_dim_v)`` in bfloat16; with ``return_lse`` also ``(..., heads_q, seq_q)``, float32.

    Raises:
        TypeError, ValueError: as :func:`fastattn.attention`; scales of another dtype or shape.
        RuntimeError: a gradient is asked for; or a named backend cannot run this call.
    """
    check_flag("return_lse", return_lse)
    scales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        **scales,
        "bias": options.get("bias"),
        "sinks": options.get("sinks"),
    }
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if isinstance(x, Tensor) and x.requires_grad:
                raise RuntimeError(
                    f"attention_fp8 has no gradient, and {name} requires one: call it under torch.no_grad(), or "
                    "fastattn.attention on 16-bit tensors"
                )
    arguments, batch = prepare_options("attention_fp8", query, key, value, options, backend, _DTYPES)
    q, heads = arguments.q, arguments.k.shape[1]
    shape = (*batch, heads)[max(0, 4 - query.dim()) :]  # without the dimensions that the query came without
    rows: list[Tensor | None] = []
    for name, x in scales.items():
        if x is not None:
            check_descale(name, x, q, shape)
            x = (x.reshape(()) if x.numel() == 1 else x).expand(*batch, heads).reshape(q.shape[0], heads)
            if checks.enabled():
                checks.check_positive(name, x)
        rows.append(x)
    others = [*(arguments.others or [None] * _BEFORE_SCALES), *rows]
    out, lse = ops.run_forward(*arguments[:5], others, *arguments.call)
    out = unfold(out, query, batch)
    return (out, unfold(lse, query, batch)) if return_lse else out
