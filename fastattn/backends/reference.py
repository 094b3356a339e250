"""The definition as a backend: whole score matrices in plain torch, on any device, forward and backward by formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends.base import Gradients, empty_like_layout
from fastattn.spec import AttentionSpec


class ReferenceBackend:
    """Runs everything, everywhere, in float32 (float64 for float64 inputs), with O(seq_q · seq_k) memory."""

    name = "reference"

    def unavailable_reason(self) -> str | None:
        return None

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        return []

    def configuration(self, spec: AttentionSpec) -> str:
        return "torch matrix products, whole score matrix in memory"

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
        wide = spec.compute_dtype
        result, lse = reference.attention(
            q.to(wide),
            k.to(wide),
            v.to(wide),
            mask=mask,
            bias=bias,
            window=spec.window,
            offset=spec.offset,
            softmax_scale=spec.softmax_scale,
            dropout_p=spec.dropout_p,
            dropout_seed=dropout_seed,
            return_lse=True,
        )
        return empty_like_layout(q, spec.head_dim_v).copy_(result), lse

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
        """With P the weights, D the dropout factors, ``∘`` elementwise:

        delta = rowsum(dO ∘ O) - dlse,   dV = (P ∘ D)ᵀ dO,   dP = D ∘ (dO Vᵀ),   dS = P ∘ (dP - delta),
        dQ = scale · dS K,   dK = scale · dSᵀ Q,   dbias = dS.
        """
        wide, heads = spec.compute_dtype, spec.heads_q
        do, q_, k_, v_ = grad_out.to(wide), q.to(wide), k.to(wide), v.to(wide)
        k_, v_ = reference.repeat_heads(k_, heads), reference.repeat_heads(v_, heads)
        visible = reference.visible_keys(
            spec.seqlen_q, spec.seqlen_k, spec.window, spec.offset, mask, bias, q.device
        ).expand(spec.batch, heads, -1, -1)
        seen_by_key = visible.transpose(-1, -2)

        p = reference.weights_from_lse(reference.scores(q_, k_, visible, bias, spec.softmax_scale), lse)
        factor: Tensor | float = 1.0
        if spec.dropout_p:
            assert dropout_seed is not None
            keep = reference.dropout_keep(
                spec.batch, heads, spec.seqlen_q, spec.seqlen_k, spec.dropout_p, dropout_seed
            ).to(wide)
            factor = keep / (1 - spec.dropout_p) if spec.dropout_p < 1 else 0 * keep
        delta = (do * out.to(wide)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse.unsqueeze(-1)
        dp = torch.where(visible, (do @ v_.transpose(-1, -2)) * factor, 0)
        ds = torch.where(visible & (lse != -math.inf).unsqueeze(-1), p * (dp - delta), 0)

        dq = reference.masked_matmul(ds, k_, visible) * spec.softmax_scale
        dk = reference.masked_matmul(ds.transpose(-1, -2), q_, seen_by_key) * spec.softmax_scale
        dv = reference.masked_matmul((p * factor).transpose(-1, -2), do, seen_by_key)
        groups = (spec.batch, spec.heads_k, spec.group_size, spec.seqlen_k, -1)
        return (
            empty_like_layout(q).copy_(dq),
            empty_like_layout(k).copy_(dk.reshape(groups).sum(2)),
            empty_like_layout(v).copy_(dv.reshape(groups).sum(2)),
            ds.sum_to_size(bias.shape).to(bias.dtype) if spec.needs_bias_grad and bias is not None else None,
        )
