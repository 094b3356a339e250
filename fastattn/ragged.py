"""Calls whose sequences differ in length: their arguments, brought to the form that the operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import checks
from fastattn.call import Arguments, Shaping, fold_mask, scalars, seed_for, shape_tensors
from fastattn.spec import Window, check_bias, check_dropout, check_mask, check_scale
from fastattn.validate import check_offset


class Ragged(NamedTuple):
    """What makes the sequences of a call differ; the fields of :class:`~fastattn.backends.base.Tensors`."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    block_table: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    num_splits: int = 0


def prepare_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ragged: Ragged,
    mask: Tensor | None,
    bias: Tensor | None,
    window: Window,
    offset: int | None,
    softmax_scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    backend: str | None,
    shaped: Shaping | None,
) -> Arguments:
    """:func:`fastattn.call.prepare` for sequences that differ, on 4-D tensors already checked for kind, type and shape.

    ``offset=None`` is the bottom-right diagonal of each sequence, else the same diagonal for all of them.
    """
    check_scale(softmax_scale)
    check_dropout(dropout_p)
    packed, paged = ragged.cu_seqlens_q is not None, ragged.block_table is not None
    batch = q.shape[0] if ragged.cu_seqlens_q is None else ragged.cu_seqlens_q.shape[0] - 1
    seqlen_q = ragged.max_seqlen_q if packed else q.shape[2]
    seqlen_k = ragged.max_seqlen_k if packed or paged else k.shape[2]
    full = (batch, q.shape[1], seqlen_q, seqlen_k)
    if mask is not None:
        check_mask(mask, q, full)
        mask = fold_mask(mask, (batch,))
    if bias is not None:
        check_bias(bias, q, full)
        bias = fold_mask(bias, (batch,))
    if checks.enabled():
        check_values(q, k, ragged, seqlen_q, seqlen_k, shaped)
    check_offset(offset)
    grad = (q, k, v, bias, shaped.sinks if shaped else None)
    if paged and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in grad):
        raise ValueError("attention to paged keys (block_table) has no gradient: call it under torch.no_grad()")
    relative = offset is None
    if relative and not packed and ragged.seqused_k is None:
        relative, offset = False, seqlen_k - seqlen_q
    seed = seed_for(dropout_p, dropout_seed, q)
    call = scalars(q, k, v, bias, window, offset or 0, softmax_scale, dropout_p, backend)
    softcap, sinks, others = 0.0, None, [mask, seed, *(None,) * 4, *ragged[:5]]
    if shaped is not None:
        softcap, slopes, sinks, *rows = shape_tensors(shaped, q, seqlen_k, seqlen_q, (batch,))
        others[2:6] = slopes, *rows
    lengths = (seqlen_q, seqlen_k) if packed else (0, seqlen_k if paged else 0)
    return Arguments(q, k, v, bias, sinks, others, (*call, softcap, relative, *lengths, ragged.num_splits))


def check_values(q: Tensor, k: Tensor, r: Ragged, seqlen_q: int, seqlen_k: int, shaped: Shaping | None) -> None:
    """What :class:`fastattn.debug_checks` promises, for one call."""
    keys: int | Tensor = seqlen_k
    if r.cu_seqlens_q is not None:
        checks.check_cumulative("cu_seqlens_q", r.cu_seqlens_q, q.shape[2], seqlen_q)
    if r.cu_seqlens_k is not None:
        checks.check_cumulative("cu_seqlens_k", r.cu_seqlens_k, k.shape[2], seqlen_k)
        keys = r.cu_seqlens_k.diff()
    if r.seqused_k is not None:
        checks.check_lengths("seqused_k", r.seqused_k, keys, "the keys that there are")
        keys = r.seqused_k
    if r.leftpad_k is not None:
        checks.check_lengths("leftpad_k", r.leftpad_k, keys, "the keys that there are")
    if r.block_table is not None:
        checks.check_pages(r.block_table, k.shape[0], k.shape[2], r.seqused_k)
    if shaped is not None and shaped.prefix_lens is not None:
        checks.check_lengths("prefix_lens", shaped.prefix_lens, seqlen_k, "the longest keys")
