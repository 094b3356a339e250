"""What a backend is, and what all of them share: how outputs are laid out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastattn.spec import AttentionSpec

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Backend(Protocol):
    """A set of kernels that obeys the contract of ``docs/architecture.md``.

    The tensors handed to ``forward`` and ``backward`` have been validated and have the shapes of the spec, in any
    strides; ``mask`` (bool) and ``bias`` are 4-D with size 1 where they are broadcast; ``dropout_seed`` is an int64
    tensor of one element on the device, present exactly when ``spec.dropout_p > 0``. The spec is never empty.
    """

    name: str

    def unavailable_reason(self) -> str | None:
        """Why nothing can run on this machine (not built, no device), or None."""

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        """Why this call cannot run; an empty list means that it can, forward and, if it asks for it, backward."""

    def configuration(self, spec: AttentionSpec) -> str:
        """The kernel and tile sizes that would run, for ``explain``."""

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
        """``out (batch, heads_q, seqlen_q, head_dim_v)`` in the input type and ``lse (batch, heads_q, seqlen_q)``."""

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
        """``dq, dk, dv`` and, when ``spec.needs_bias_grad``, ``dbias`` in the bias's own shape and type."""


def empty_like_layout(x: Tensor, head_dim: int | None = None) -> Tensor:
    """An uninitialised ``(batch, heads, seq, head_dim)`` tensor, dense, with the order of heads and seq that ``x`` has.

    A view of a ``(batch, seq, heads, head_dim)`` projection thus gets an output that folds back without a copy.
    """
    batch, heads, seq, dim = x.shape
    dim = dim if head_dim is None else head_dim
    if heads > 1 and seq > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((batch, seq, heads, dim)).transpose(1, 2)
    return x.new_empty((batch, heads, seq, dim))


def empty_lse(q: Tensor) -> Tensor:
    """Uninitialised ``(batch, heads_q, seq_q)``, float64 for float64 queries, else float32."""
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype is torch.float64 else torch.float32)
