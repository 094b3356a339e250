"""The definition as a backend: whole score matrices in plain torch, on any device, forward and backward by formula."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends.base import Gradients, Tensors, empty_like_layout, empty_lse
from fastattn.spec import FP8, AttentionSpec, dtype_names


class ReferenceBackend:
    """Runs everything (but e4m3 widened), everywhere, in float32 or float64, with O(seq_q · seq_k) memory.

    Packed and paged tensors are first laid out as ``(batch, heads, seq, head_dim)``. The number of splits changes
    nothing here: there is one sum.
    """

    name = "reference"

    def unavailable_reason(self) -> str | None:
        return None

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        return [f"dtype {dtype_names((spec.dtype,))}"] if spec.dtype is FP8 else []

    def configuration(self, spec: AttentionSpec) -> str:
        return "torch matrix products, whole score matrix in memory"

    def forward(self, spec: AttentionSpec, t: Tensors) -> tuple[Tensor, Tensor]:
        p = _pad(spec, t)
        wide = spec.compute_dtype
        result, lse = reference.attention(
            p.q.to(wide),
            p.k.to(wide),
            p.v.to(wide),
            mask=t.mask,
            bias=t.bias,
            window=spec.window,
            offset=p.offset,  # type: ignore[arg-type]
            softmax_scale=spec.softmax_scale,
            dropout_p=spec.dropout_p,
            dropout_seed=t.dropout_seed,
            return_lse=True,
            softcap=spec.softcap,
            alibi_slopes=t.alibi_slopes,
            sinks=t.sinks,
            **p.lengths,
        )
        out = empty_like_layout(t.q, spec.head_dim_v).copy_(_pack(result, p.rows_q))
        return out, empty_lse(t.q).copy_(_pack(lse.unsqueeze(-1), p.rows_q).squeeze(-1))

    def backward(
        self, spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        """With P the weights, D the dropout factors, C the derivative of the softcap, ``∘`` elementwise:

        delta = rowsum(dO ∘ O) - dlse,   dV = (P ∘ D)ᵀ dO,   dP = D ∘ (dO Vᵀ),   dS = P ∘ (dP - delta),   dbias = dS,
        dQ = scale · (C ∘ dS) K,   dK = scale · (C ∘ dS)ᵀ Q,   C = 1 - (capped scores / softcap)².
        """
        p, wide, heads = _pad(spec, t), spec.compute_dtype, spec.heads_q
        do, o = (_unpack(x.to(wide), p.rows_q) for x in (grad_out, out))
        lse = _unpack(lse.unsqueeze(-1), p.rows_q).squeeze(-1)
        q, k, v = (reference.repeat_heads(x.to(wide), heads) for x in (p.q, p.k, p.v))
        visible = reference.visible_keys(
            spec.seqlen_q, spec.seqlen_k, spec.window, p.offset, t.mask, t.bias, q.device, **p.lengths
        ).expand(spec.batch, heads, -1, -1)
        seen_by_key = visible.transpose(-1, -2)

        s = reference.scores(q, k, visible, t.bias, spec.softmax_scale, spec.softcap, t.alibi_slopes, p.offset)
        weights = reference.weights_from_lse(s, lse, t.bias is not None)
        factor: Tensor | float = 1.0
        if spec.dropout_p:
            assert t.dropout_seed is not None
            keep = reference.dropout_keep(
                spec.batch, heads, spec.seqlen_q, spec.seqlen_k, spec.dropout_p, t.dropout_seed
            ).to(wide)
            factor = keep / (1 - spec.dropout_p) if spec.dropout_p < 1 else 0 * keep
        delta = (do * o).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - _unpack(grad_lse.unsqueeze(-1), p.rows_q)
        dp = torch.where(visible, (do @ v.transpose(-1, -2)) * factor, 0)
        ds = torch.where(visible & (lse != -math.inf).unsqueeze(-1), weights * (dp - delta), 0)
        dqk = ds
        if spec.softcap:
            capped = torch.tanh(q @ k.transpose(-1, -2) * (spec.softmax_scale / spec.softcap))
            dqk = torch.where(visible, ds * (1 - capped.square()), 0)

        dq = reference.masked_matmul(dqk, k, visible) * spec.softmax_scale
        dk = reference.masked_matmul(dqk.transpose(-1, -2), q, seen_by_key) * spec.softmax_scale
        dv = reference.masked_matmul((weights * factor).transpose(-1, -2), do, seen_by_key)
        groups = (spec.batch, spec.heads_k, spec.group_size, spec.seqlen_k, -1)
        dk, dv = (_pack(x.reshape(groups).sum(2), p.rows_k) for x in (dk, dv))
        return (
            empty_like_layout(t.q).copy_(_pack(dq, p.rows_q)),
            empty_like_layout(t.k).copy_(dk),
            empty_like_layout(t.v).copy_(dv),
            ds.sum_to_size(t.bias.shape).to(t.bias.dtype) if spec.needs_bias_grad and t.bias is not None else None,
        )


class _Rows(NamedTuple):
    """Where the rows of packed sequences stand in padded ones: row ``n`` is ``at[n]`` of sequence ``of[n]``."""

    of: Tensor
    at: Tensor
    batch: int
    seqlen: int


class _Padded(NamedTuple):
    """A call whose tensors are ``(batch, heads, seq, head_dim)``, and what makes its sequences differ."""

    q: Tensor
    k: Tensor
    v: Tensor
    offset: int | Tensor
    lengths: dict[str, Any]
    rows_q: _Rows | None
    rows_k: _Rows | None


def _rows(cu_seqlens: Tensor, seqlen: int) -> _Rows:
    cu = cu_seqlens.long()
    batch = cu.shape[0] - 1
    of = torch.arange(batch, device=cu.device).repeat_interleave(cu.diff())
    return _Rows(of, torch.arange(of.shape[0], device=cu.device) - cu[of], batch, seqlen)


def _unpack(x: Tensor, rows: _Rows | None) -> Tensor:
    """``(1, heads, total, dim)`` to ``(batch, heads, seqlen, dim)``, zeros behind the end of each sequence."""
    if rows is None:
        return x
    padded = x.new_zeros(rows.batch, rows.seqlen, x.shape[1], x.shape[3])
    padded[rows.of, rows.at] = x[0].transpose(0, 1)
    return padded.transpose(1, 2)


def _pack(x: Tensor, rows: _Rows | None) -> Tensor:
    """``(batch, heads, seqlen, dim)`` to ``(1, heads, total, dim)``."""
    return x if rows is None else x.transpose(1, 2)[rows.of, rows.at].transpose(0, 1).unsqueeze(0)


def _pages(x: Tensor, block_table: Tensor, seqlen: int) -> Tensor:
    """``(num_pages, heads, page_size, dim)`` to ``(batch, heads, seqlen, dim)``."""
    return x[block_table.long()].transpose(1, 2).flatten(2, 3)[:, :, :seqlen]


def _pad(spec: AttentionSpec, t: Tensors) -> _Padded:
    q, k, v = t.q, t.k, t.v
    rows_q = rows_k = seqlens_q = seqlens_k = None
    if t.cu_seqlens_q is not None:
        rows_q, seqlens_q = _rows(t.cu_seqlens_q, spec.seqlen_q), t.cu_seqlens_q.diff()
        q = _unpack(q, rows_q)
    if t.block_table is not None:
        k, v = (_pages(x, t.block_table, spec.seqlen_k) for x in (k, v))
    elif t.cu_seqlens_k is not None:
        rows_k, seqlens_k = _rows(t.cu_seqlens_k, spec.seqlen_k), t.cu_seqlens_k.diff()
        k, v = _unpack(k, rows_k), _unpack(v, rows_k)
    if t.seqused_k is not None:
        seqlens_k = t.seqused_k
    offset: int | Tensor = spec.offset
    if spec.relative_offset:
        offset = offset + reference.diagonals(spec.seqlen_q, spec.seqlen_k, seqlens_q, seqlens_k)
    lengths = {
        "q_segments": t.q_segments,
        "k_segments": t.k_segments,
        "prefix_lens": t.prefix_lens,
        "seqlens_q": seqlens_q,
        "seqlens_k": seqlens_k,
        "leftpad_k": t.leftpad_k,
    }
    return _Padded(q, k, v, offset, lengths, rows_q, rows_k)
