"""What a backend is, what it is handed, and what all of them share: how outputs are laid out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastattn.spec import AttentionSpec, out_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Tensors(NamedTuple):
    """All tensors of one call, in any strides; None where the spec says that there is none."""

    q: Tensor  #: (batch, heads_q, seqlen_q, head_dim_qk); packed (1, heads_q, total_q, head_dim_qk)
    k: Tensor  #: (batch, heads_k, seqlen_k, head_dim_qk); packed with total_k; (num_pages, heads_k, page_size, ...)
    v: Tensor  #: like k, with head_dim_v
    bias: Tensor | None = None  #: broadcasts to (batch, heads_q, seqlen_q, seqlen_k), 4-D, size 1 where broadcast
    sinks: Tensor | None = None  #: (heads_q,), of lse's type
    mask: Tensor | None = None  #: bool, like bias; True = visible
    dropout_seed: Tensor | None = None  #: int64, one element, on the device
    alibi_slopes: Tensor | None = None  #: float32 (heads_q,) or (batch, heads_q)
    q_segments: Tensor | None = None  #: int32 (batch or 1, seqlen_q)
    k_segments: Tensor | None = None  #: int32 (batch or 1, seqlen_k)
    prefix_lens: Tensor | None = None  #: int32 (batch,)
    cu_seqlens_q: Tensor | None = None  #: int32 (batch + 1,), from 0 to total_q
    cu_seqlens_k: Tensor | None = None  #: int32 (batch + 1,), from 0 to total_k; None when paged
    seqused_k: Tensor | None = None  #: int32 (batch,)
    leftpad_k: Tensor | None = None  #: int32 (batch,)
    block_table: Tensor | None = None  #: int32 (batch, pages)
    q_descale: Tensor | None = None  #: float32 (batch, heads_k), of e4m3 inputs; None: 1
    k_descale: Tensor | None = None  #: likewise
    v_descale: Tensor | None = None  #: likewise


class Backend(Protocol):
    """A set of kernels that obeys the contract of ``docs/architecture.md``.

    The tensors handed to ``forward`` and ``backward`` have been validated, but for what only their values on the
    device tell (``fastattn.debug_checks``), and have the shapes of the spec. The spec is never empty; one with
    ``needs_grad`` is never paged.
    """

    name: str

    def unavailable_reason(self) -> str | None:
        """Why nothing can run on this machine (not built, no device), or None."""

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        """Why this call cannot run; an empty list means that it can, forward and, if it asks for it, backward."""

    def configuration(self, spec: AttentionSpec) -> str:
        """The kernel and tile sizes that would run, for ``explain``."""

    def forward(self, spec: AttentionSpec, t: Tensors) -> tuple[Tensor, Tensor]:
        """``out``, of ``spec.out_dtype``, q's shape but ``head_dim_v``; ``lse``, of q's shape without ``head_dim``."""

    def backward(
        self, spec: AttentionSpec, t: Tensors, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> Gradients:
        """``dq, dk, dv`` and, when ``spec.needs_bias_grad``, ``dbias`` in the bias's own shape and type.

        Sinks need nothing here: they are in ``lse``, and their gradient is taken from it (``ops.sinks_gradient``).
        """


def empty_like_layout(x: Tensor, head_dim: int | None = None) -> Tensor:
    """An uninitialised ``(batch, heads, seq, head_dim)`` tensor, dense, with the order of heads and seq that ``x`` has.

    A view of a ``(batch, seq, heads, head_dim)`` projection thus gets an output that folds back without a copy. It is
    of x's type, of bfloat16 for e4m3.
    """
    batch, heads, seq, dim = x.shape
    dtype = out_dtype(x.dtype)
    if x.is_contiguous() and (head_dim is None or head_dim == dim):
        return torch.empty_like(x) if dtype is x.dtype else torch.empty_like(x, dtype=dtype)
    dim = dim if head_dim is None else head_dim
    if heads > 1 and seq > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((batch, seq, heads, dim), dtype=dtype).transpose(1, 2)
    return x.new_empty((batch, heads, seq, dim), dtype=dtype)


def empty_lse(q: Tensor) -> Tensor:
    """Uninitialised ``(batch, heads_q, seq_q)``, float64 for float64 queries, else float32."""
    batch, heads, seq, _ = q.shape
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    return torch.empty(batch, heads, seq, dtype=wide, device=q.device)  # a tuple would take longer
