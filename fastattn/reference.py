"""Attention as the definition says it, in plain torch: the oracle that every kernel is held to.

    attention(Q, K, V) = softmax(scale · Q Kᵀ + bias) V         Vaswani et al. 2017 (arXiv 1706.03762), eq. 1

Written to be read, and to be right in float64; it holds the whole score matrix in memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.spec import Window, check_bias, check_mask, check_shapes, check_tensors, check_window
from fastattn.validate import check_flag

_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_U32 = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four random 32-bit words, in int64, for each 128-bit counter.

    Args:
        c0, c1, c2, c3: counter words, int64 in [0, 2^32), broadcastable against one another.
        seed: int64, one element; its low and high halves are the key.
    """
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1  # wraps modulo 2^64: both halves are what they should be
        c0, c1, c2, c3 = ((p1 >> 32) & _U32) ^ c1 ^ k0, p1 & _U32, ((p0 >> 32) & _U32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + _PHILOX_W0) & _U32, (k1 + _PHILOX_W1) & _U32
    return c0, c1, c2, c3


def dropout_keep(batch: int, heads: int, seqlen_q: int, seqlen_k: int, p: float, seed: Tensor) -> Tensor:
    """Which entries dropout keeps: bool ``(batch, heads, seqlen_q, seqlen_k)``, the same on every backend.

    Entry ``(b, h, i, j)`` is dropped iff word ``j % 4`` of ``philox(j // 4, i, b·heads + h; seed)`` is below ``p·2³²``.
    """
    seed = seed.reshape(())
    bh = torch.arange(batch * heads, device=seed.device).view(-1, 1, 1)
    i = torch.arange(seqlen_q, device=seed.device).view(-1, 1)
    j4 = torch.arange((seqlen_k + 3) // 4, device=seed.device)
    words = torch.stack(torch.broadcast_tensors(*philox(j4, i, bh & _U32, bh >> 32, seed)), dim=-1)
    return (words.flatten(-2)[..., :seqlen_k] >= int(p * 2**32)).view(batch, heads, seqlen_q, seqlen_k)


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    window: Window = (None, None),
    offset: int | Tensor = 0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    device: torch.device | None = None,
    *,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: bool, broadcastable to ``(batch, heads, seqlen_q, seqlen_k)``.

    Inside the window or the prefix; of the query's segment; True in the mask, and not -inf in the bias; and neither
    the query nor the key is padding. Arguments as :func:`attention`; ``offset`` may be ``(batch, 1, 1, 1)``.
    """
    left, right = window
    i = torch.arange(seqlen_q, device=device).view(-1, 1)
    j = torch.arange(seqlen_k, device=device)
    diagonal = i + offset
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left is not None:
        visible = visible & (j >= diagonal - left)
    if right is not None:
        visible = visible & (j <= diagonal + right)
    if prefix_lens is not None:
        visible = visible | (j < per_sequence(prefix_lens))
    if q_segments is not None and k_segments is not None:
        visible = visible & (q_segments[:, None, :, None] == k_segments[:, None, None, :])
    if seqlens_q is not None:
        visible = visible & (i < per_sequence(seqlens_q))
    if seqlens_k is not None:
        visible = visible & (j < per_sequence(seqlens_k))
    if leftpad_k is not None:
        visible = visible & (j >= per_sequence(leftpad_k))
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        visible = visible & (bias != -math.inf)
    return visible


def per_sequence(x: Tensor) -> Tensor:
    """``(batch,)`` as ``(batch, 1, 1, 1)``."""
    return x.view(-1, 1, 1, 1)


def masked_matmul(a: Tensor, b: Tensor, visible: Tensor) -> Tensor:
    """``a @ b`` for an ``a`` that is 0 where not ``visible``, in which an unseen row of ``b`` counts for nothing.

    Only differs from ``a @ b`` when ``b`` holds inf or NaN: 0 · NaN is NaN, yet what is unseen must not be felt.
    """
    finite = b.isfinite()
    if finite.all():
        return a @ b
    product = a @ torch.where(finite, b, 0)
    seen = visible.to(a.dtype).expand(*a.shape[:-2], *visible.shape[-2:])
    for value in (math.nan, math.inf, -math.inf):
        holds = b.isnan() if math.isnan(value) else b == value
        product = torch.where(seen @ holds.to(a.dtype) > 0, product + value, product)
    return product


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """``(batch, heads_k, ...)`` as ``(batch, heads, ...)``: each head serves a group of consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def alibi(slopes: Tensor, seqlen_q: int, seqlen_k: int, offset: int | Tensor) -> Tensor:
    """``-slope · |i + offset - j|`` (Press et al., arXiv 2108.12409), ``(batch or 1, heads, seqlen_q, seqlen_k)``.

    ``slopes`` is ``(heads,)`` or ``(batch, heads)``.
    """
    i = torch.arange(seqlen_q, device=slopes.device).view(-1, 1)
    j = torch.arange(seqlen_k, device=slopes.device)
    return -slopes.view(-1, slopes.shape[-1], 1, 1) * (i + offset - j).abs()


def scores(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    softmax_scale: float,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """``cap(scale · q kᵀ) + alibi + bias``, -inf where not visible; ``cap(s) = softcap · tanh(s / softcap)``.

    ``k`` has as many heads as ``q``.
    """
    s = (q @ k.transpose(-1, -2)) * softmax_scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s + alibi(alibi_slopes.to(s.dtype), s.shape[-2], s.shape[-1], offset)
    if bias is not None:
        s = s + bias.to(s.dtype)
    return torch.where(visible, s, -math.inf)


def softmax(s: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and natural log-sum-exp over the last dimension; a row of -inf has weights 0 and -inf, with gradient 0.

    ``sinks (heads,)`` is one more logit in every row, in the denominator only: the weights then sum to less than 1.
    The weights are exp(s - max) / sum, not exp(s - lse): beside a maximum of finfo.min the logarithm is lost in lse.
    """
    sink = None if sinks is None else sinks.to(s.dtype).view(-1, 1, 1)
    if s.shape[-1] == 0:
        lse = s.new_full(s.shape[:-1], -math.inf)
        return s, lse if sink is None else lse.logaddexp(sink.squeeze(-1))
    top = s.amax(-1, keepdim=True)
    top = (top if sink is None else top.maximum(sink)).detach()
    top = torch.where(top == -math.inf, 0, top)
    p = (s - top).exp()
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    nothing = total == 0
    total = torch.where(nothing, 1, total)
    return p / total, torch.where(nothing, -math.inf, top + total.log()).squeeze(-1)


def weights_from_lse(s: Tensor, lse: Tensor, biased: bool = False) -> Tensor:
    """``exp(s - lse)``: the softmax of the scores; 0 in rows that see nothing.

    With a bias there may be rows of finfo.min alone, in whose lse the logarithm of the sum is lost: they are divided
    by their sum.
    """
    lse = torch.where(lse == -math.inf, 0, lse).unsqueeze(-1)
    p = (s - lse.to(s.dtype)).exp()
    return p / torch.where(lse.abs() * torch.finfo(lse.dtype).eps > 1, p.sum(-1, keepdim=True), 1) if biased else p


def diagonals(
    seqlen_q: int, seqlen_k: int, seqlens_q: Tensor | None = None, seqlens_k: Tensor | None = None
) -> int | Tensor:
    """Keys less queries: the offset that puts the diagonal in the bottom right corner, of each sequence if they differ.

    An int, or ``(batch, 1, 1, 1)``.
    """
    if seqlens_q is None and seqlens_k is None:
        return seqlen_k - seqlen_q
    keys = seqlen_k if seqlens_k is None else per_sequence(seqlens_k)
    return keys - (seqlen_q if seqlens_q is None else per_sequence(seqlens_q))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    offset: int | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The naive implementation of :func:`fastattn.attention`: same arguments, same meaning, any order of derivative.

    Computes in the dtype of its inputs, so that float64 inputs give the oracle and bfloat16 ones the error that plain
    bfloat16 arithmetic makes. Memory O(seq_q · seq_k).

    Args:
        query: ``(batch, heads_q, seq_q, head_dim_qk)``, float16, bfloat16, float32 or float64.
        key: ``(batch, heads_k, seq_k, head_dim_qk)``.
        value: ``(batch, heads_k, seq_k, head_dim_v)``.
        dropout_seed: int64, one element; needed when ``dropout_p`` > 0.
        seqlens_q, seqlens_k: integers ``(batch,)``: queries and keys of each sequence, those beyond are padding. They
            move the default ``offset`` to ``seqlens_k - seqlens_q``, sequence by sequence.
        leftpad_k: integers ``(batch,)``: keys before this one are padding, too.

    Returns:
        ``(batch, heads_q, seq_q, head_dim_v)``, and with ``return_lse`` the log-sum-exp ``(batch, heads_q, seq_q)``.

    Raises:
        TypeError, ValueError: tensors of the wrong kind, type or shape; dropout without a seed.
    """
    check_flag("return_lse", return_lse)
    check_tensors(query, key, value)
    if not query.dim() == key.dim() == value.dim() == 4:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"query, key and value must be (batch, heads, seq, head_dim); got {shapes}")
    check_shapes(query, key, value)
    check_window(window)
    batch, heads, seqlen_q, head_dim = query.shape
    seqlen_k = key.shape[2]
    if mask is not None:
        check_mask(mask, query, (batch, heads, seqlen_q, seqlen_k))
    if bias is not None:
        check_bias(bias, query, (batch, heads, seqlen_q, seqlen_k))
    left, right = window or (None, None)
    if causal:
        right = 0 if right is None else min(right, 0)
    diagonal = diagonals(seqlen_q, seqlen_k, seqlens_q, seqlens_k) if offset is None else offset
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    k, v = repeat_heads(key, heads), repeat_heads(value, heads)
    visible = visible_keys(
        seqlen_q,
        seqlen_k,
        (left, right),
        diagonal,
        mask,
        bias,
        query.device,
        q_segments=q_segments,
        k_segments=k_segments,
        prefix_lens=prefix_lens,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        leftpad_k=leftpad_k,
    )

    s = scores(query, k, visible, bias, scale, softcap, alibi_slopes, diagonal)
    p, lse = softmax(s, sinks)
    if dropout_p:
        if dropout_seed is None:
            raise ValueError("dropout_p > 0 needs a dropout_seed, an int64 tensor of one element")
        keep = dropout_keep(batch, heads, seqlen_q, seqlen_k, dropout_p, dropout_seed)
        p = torch.where(keep, p / (1 - dropout_p), 0) if dropout_p < 1 else torch.zeros_like(p)
    out = masked_matmul(p, v, visible)
    return (out, lse) if return_lse else out
