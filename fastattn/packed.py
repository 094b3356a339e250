"""Sequences of different lengths: packed one behind the other, without padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import ops
from fastattn.call import autocast, combine_window, shaping
from fastattn.ragged import Ragged, prepare_ragged
from fastattn.spec import Window, check_shapes, check_tensors
from fastattn.validate import check_block_table, check_cu_seqlens, check_flag, check_integers, check_length


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    offset: int | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastattn.attention` on packed sequences; each attends to its own keys alone.

    Sequence ``b`` is rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of query, and likewise of key and value. The
    result is that of a loop over the sequences, in one launch and without padding::

        for b in range(batch):
            q, k, v = query[cu_q[b] : cu_q[b + 1]], key[cu_k[b] : cu_k[b + 1]], value[cu_k[b] : cu_k[b + 1]]
            out[cu_q[b] : cu_q[b + 1]] = attention(*(x.transpose(0, 1) for x in (q, k, v)), ...).transpose(0, 1)

    Args:
        query: ``(total_q, heads_q, head_dim_qk)``, any strides.
        key: ``(total_k, heads_k, head_dim_qk)``; with ``block_table`` pages, ``(num_pages, page_size, heads_k, ...)``.
        value: ``(total_k, heads_k, head_dim_v)``; or pages.
        cu_seqlens_q: int32 ``(batch + 1,)``, non-decreasing, from 0 to ``total_q``; sequences may be empty. That it is
            so is not checked, its values are on the device: see :func:`fastattn.debug_checks`.
        cu_seqlens_k: likewise for the keys. Default: ``cu_seqlens_q``, for self-attention.
        max_seqlen_q, max_seqlen_k: at least the longest lengths; read from the device when not given, which waits
            for it.
        seqused_k: integers ``(batch,)``: only so many keys of each sequence count. Default: all.
        block_table: int32 ``(batch, pages)``: key ``j`` of sequence ``b`` is row ``j % page_size`` of page
            ``block_table[b, j // page_size]``. Forward only; ``cu_seqlens_k`` then only tells lengths, unless
            ``seqused_k`` does.
        mask: boolean, broadcastable to ``(batch, heads_q, max_seqlen_q, max_seqlen_k)``, by position in the sequence.
        bias: floating, likewise.
        causal, window: around the diagonal of each sequence, which is bottom-right: ``offset`` is the sequence's number
            of keys less that of its queries.
        offset: one diagonal for all sequences; 0 is top-left. Default: bottom-right.
        softmax_scale, softcap, alibi_slopes, sinks, dropout_p, dropout_seed, return_lse, backend: as in
            :func:`fastattn.attention`, with ``alibi_slopes`` ``(heads_q,)`` or ``(batch, heads_q)``.
        q_segments: integers ``(total_q,)``: within its sequence, a query sees the keys of its own segment.
        k_segments: integers ``(total_k,)``, or ``(num_pages, page_size)`` of pages. Default: ``q_segments``, where
            ``cu_seqlens_k`` is not given.
        prefix_lens: integers ``(batch,)``; as in :func:`fastattn.attention`.
        num_splits: parts that the keys are split into, for few queries on many keys; 0: the kernel chooses. Changes
            speed and rounding.

    Returns:
        ``(total_q, heads_q, head_dim_v)`` in the query's dtype; with ``return_lse`` also ``(heads_q, total_q)`` in
        float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as :func:`fastattn.attention`; also when cu_seqlens, tables or lengths have the wrong
            dtype or shape, or a paged call asks for a gradient.
    """
    check_flag("return_lse", return_lse)
    if block_table is None:
        query, key, value = autocast(query, key, value)
    check_tensors(query, key, value)
    for name, x, dims in (("query", query, 3), ("key", key, 4 if block_table is not None else 3)):
        if x.dim() != dims:
            kind = "pages (num_pages, page_size, heads, head_dim)" if dims == 4 else "packed (total, heads, head_dim)"
            raise ValueError(f"{name} must be {kind}, got shape {tuple(x.shape)}")
    if value.dim() != key.dim():
        raise ValueError(f"value must have as many dimensions as key; got {tuple(value.shape)}, {tuple(key.shape)}")
    q = query.transpose(0, 1).unsqueeze(0)
    k, v = (x.transpose(1, 2) if block_table is not None else x.transpose(0, 1).unsqueeze(0) for x in (key, value))
    check_shapes(q, k, v)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, None)
    batch, alone = cu_seqlens_q.shape[0] - 1, cu_seqlens_k is None
    if cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, batch)
    if seqused_k is not None:
        check_integers("seqused_k", seqused_k, q, (batch,))
        seqused_k = seqused_k.to(torch.int32).expand(batch)
    max_q = _longest(cu_seqlens_q) if max_seqlen_q is None else check_length("max_seqlen_q", max_seqlen_q)
    if block_table is not None:
        seqused_k, cu_seqlens_k = _used_of_pages(block_table, cu_seqlens_k, seqused_k, q, batch), None
        max_k = block_table.shape[1] * k.shape[2]
    else:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        if cu_seqlens_k is cu_seqlens_q and max_seqlen_k is None:
            max_k = max_q
        else:
            max_k = _longest(cu_seqlens_k) if max_seqlen_k is None else check_length("max_seqlen_k", max_seqlen_k)
    if q_segments is not None or k_segments is not None:
        k_segments = q_segments if k_segments is None and alone and block_table is None else k_segments
        q_segments = _segments("q_segments", q_segments, q, (query.shape[0],), cu_seqlens_q, None, max_q)
        k_segments = _segments("k_segments", k_segments, q, key.shape[:-2], cu_seqlens_k, block_table, max_k)
    arguments = prepare_ragged(
        q,
        k,
        v,
        Ragged(
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_k,
            None,
            block_table,
            max_q,
            max_k,
            check_length("num_splits", num_splits),
        ),
        mask,
        bias,
        combine_window(causal, window),
        offset,
        softmax_scale,
        dropout_p,
        dropout_seed,
        backend,
        shaping(softcap, alibi_slopes, sinks, q_segments, k_segments, prefix_lens),
    )
    out, lse = ops.run_forward(*arguments[:6], *arguments.call)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


class Unpadded(NamedTuple):
    """What :func:`unpad` returns: ``values`` and ``cu_seqlens`` are what :func:`attention_varlen` takes."""

    values: Tensor  #: (total, ...): the rows that are no padding
    cu_seqlens: Tensor  #: int32 (batch + 1,)
    max_seqlen: int
    indices: Tensor  #: int64 (total,): where the rows stood in (batch · seq)
    shape: tuple[int, int]  #: batch, seq


def unpad(x: Tensor, key_padding_mask: Tensor) -> Unpadded:
    """Leave out the padding of ``x``, wherever it is; differentiable. Waits for the device, to know how much is left.

    Args:
        x: ``(batch, seq, ...)``.
        key_padding_mask: bool ``(batch, seq)``, True = padding, as in :class:`fastattn.MultiHeadAttention`.

    Example::

        >>> u = fastattn.unpad(x, key_padding_mask)
        >>> q, k, v = proj(u.values).unflatten(-1, (3, heads, -1)).unbind(1)
        >>> out = fastattn.attention_varlen(q, k, v, u.cu_seqlens, max_seqlen_q=u.max_seqlen)
        >>> y = fastattn.pad(out.flatten(1), u)
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a torch.Tensor (batch, seq, ...), got {got}")
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype is not torch.bool:
        raise TypeError("key_padding_mask must be a boolean tensor, True = padding")
    if key_padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask must have shape (batch, seq) = {tuple(x.shape[:2])}, got {tuple(key_padding_mask.shape)}"
        )
    kept = ~key_padding_mask
    lengths = kept.sum(1, dtype=torch.int32)
    indices = kept.flatten().nonzero().squeeze(1)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.shape[0] else 0
    return Unpadded(x.flatten(0, 1)[indices], cu_seqlens, longest, indices, (x.shape[0], x.shape[1]))


def pad(values: Tensor, like: Unpadded) -> Tensor:
    """``(total, ...)`` back to ``(batch, seq, ...)``, with 0 where :func:`unpad` found padding."""
    batch, seq = like.shape
    if values.shape[:1] != like.indices.shape:
        raise ValueError(f"values must have the {like.indices.shape[0]} rows of unpad, got shape {tuple(values.shape)}")
    padded = values.new_zeros((batch * seq, *values.shape[1:]))
    return padded.index_copy(0, like.indices, values).unflatten(0, (batch, seq))


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0


def _segments(
    name: str,
    ids: Tensor | None,
    q: Tensor,
    expected: tuple[int, ...],
    cu_seqlens: Tensor | None,
    block_table: Tensor | None,
    longest: int,
) -> Tensor:
    """An id per packed row, or per row of each page, as ``(batch, longest)``: what stands behind an end is not read."""
    if ids is None:
        raise ValueError(f"q_segments and k_segments are given together: {name} is missing")
    check_integers(name, ids, q, expected)
    if ids.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(ids.shape)}")
    if block_table is not None:
        return ids[block_table.long()].flatten(1)
    assert cu_seqlens is not None
    rows = cu_seqlens[:-1, None] + torch.arange(longest, device=ids.device)
    if ids.shape[0] == 0:
        return ids.new_zeros(rows.shape)
    return ids[rows.clamp(max=ids.shape[0] - 1)]


def _used_of_pages(
    block_table: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, q: Tensor, batch: int
) -> Tensor:
    """The lengths of paged sequences, ``seqused_k`` or those that ``cu_seqlens_k`` has."""
    check_block_table(block_table, q, batch)
    if seqused_k is not None:
        return seqused_k
    if cu_seqlens_k is None:
        raise ValueError("with a block_table, pass seqused_k or cu_seqlens_k: how many keys each sequence has")
    return cu_seqlens_k.diff()
