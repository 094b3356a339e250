"""What attention looked at: its weights, recomputed from the log-sum-exp, and statistics of them without the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends.base import Tensors
from fastattn.call import Arguments, AttentionOptions, prepare_options, unfold
from fastattn.validate import check_length

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _block(a: Arguments, lse: Tensor, rows: slice, heads: slice = slice(None)) -> Tensor:
    """``exp(scores - lse)`` of some queries and heads, before dropout: ``(batch, heads, rows, seq_k)``."""
    t = Tensors(*a[:5], *a.others)
    scale, left, right, diagonal, *_ = a.call
    softcap = a.call[8] if len(a.call) > 8 else 0.0
    seqlen_q, seqlen_k = t.q.shape[2], t.k.shape[2]
    start, stop, _ = rows.indices(seqlen_q)

    def some(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x if x.shape[1] == 1 else x[:, heads]
        return x if x.shape[2] == 1 else x[:, :, rows]

    mask, bias = some(t.mask), some(t.bias)
    slopes = None if t.alibi_slopes is None else t.alibi_slopes[..., heads]
    wide = torch.float64 if t.q.dtype is torch.float64 else torch.float32
    visible = reference.visible_keys(
        stop - start,
        seqlen_k,
        (left, right),
        diagonal + start,
        mask,
        bias,
        t.q.device,
        q_segments=None if t.q_segments is None else t.q_segments[:, rows],
        k_segments=t.k_segments,
        prefix_lens=t.prefix_lens,
    )
    with torch.autocast(t.q.device.type, enabled=False):
        q, k = t.q[:, heads, rows].to(wide), reference.repeat_heads(t.k.to(wide), t.q.shape[1])[:, heads]
        s = reference.scores(q, k, visible, bias, scale, softcap, slopes, diagonal + start)
        return reference.weights_from_lse(s, lse.reshape(t.q.shape[:3])[:, heads, rows], bias is not None)


def _check_lse(lse: Tensor, query: Tensor, a: Arguments, batch: tuple[int, ...]) -> None:
    """Raise unless ``lse`` is what ``attention(..., return_lse=True)`` returns for these arguments."""
    expected = (*batch, *a.q.shape[1:3])[-max(query.dim() - 1, 1) :]
    if not isinstance(lse, Tensor) or not lse.is_floating_point():
        got = str(lse.dtype) if isinstance(lse, Tensor) else type(lse).__name__
        raise TypeError(f"lse must be a floating-point torch.Tensor, got {got}")
    if tuple(lse.shape) != tuple(expected):
        raise ValueError(f"lse must have shape (..., heads_q, seq_q) = {tuple(expected)}, got {tuple(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"lse must be on the query's device {query.device}, got {lse.device}")


def attention_weights(
    query: Tensor, key: Tensor, lse: Tensor, *, average_heads: bool = False, **options: Unpack[AttentionOptions]
) -> Tensor:
    """The attention matrix of an :func:`fastattn.attention` call, recomputed from its lse: ``exp(scores - lse)``.

    No second softmax is taken; the result holds ``seq_q · seq_k`` numbers per head, or for all heads together, and is
    differentiable in query, key, bias and lse. Sinks are in lse: with them, rows sum to less than 1.

    Args:
        query: ``(..., heads_q, seq_q, head_dim_qk)``.
        key: ``(..., heads_k, seq_k, head_dim_qk)``.
        lse: ``(..., heads_q, seq_q)``, as ``attention(..., return_lse=True)`` returns it.
        average_heads: the mean over heads, summed up one head at a time. Default: False.
        options: of the :func:`fastattn.attention` call, as they were given to it. With dropout the weights are those
            after it, and the seed must be given; what sinks do is in lse.

    Returns:
        ``(..., heads_q, seq_q, seq_k)``, averaged ``(..., seq_q, seq_k)``, in the query's dtype; rows that see nothing
        are 0.

    Raises:
        TypeError, ValueError: as :func:`fastattn.attention`; also when dropout comes without its seed.
    """
    dropout_p = options.get("dropout_p", 0.0)
    if dropout_p and options.get("dropout_seed") is None:
        raise ValueError("dropout_p > 0 needs the dropout_seed of the attention call whose weights these are")
    arguments, batch = prepare_options("attention_weights", query, key, key, options)
    _check_lse(lse, query, arguments, batch)
    q, k, seed = arguments.q, arguments.k, arguments.others[1] if arguments.others else None
    keep = None
    if seed is not None:
        keep = reference.dropout_keep(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dropout_p, seed)

    def weights(heads: slice) -> Tensor:
        p = _block(arguments, lse, slice(None), heads)
        if keep is None:
            return p
        return torch.where(keep[:, heads], p / (1 - dropout_p), 0) if dropout_p < 1 else torch.zeros_like(p)

    if not average_heads:
        return unfold(weights(slice(None)).to(q.dtype), query, batch)
    number = q.shape[1]
    total = sum((weights(slice(h, h + 1)) for h in range(number)), start=torch.zeros((), device=q.device))
    return unfold((total / number).to(q.dtype), query, batch).squeeze(-3)


class AttentionStatistics(NamedTuple):
    """What :func:`attention_statistics` returns."""

    key_mass: Tensor  #: (..., heads_q, seq_k): the weight each key received, summed over queries
    top_weights: Tensor | None  #: (..., heads_q, seq_q, top_k), in falling order
    top_keys: Tensor | None  #: (..., heads_q, seq_q, top_k), int64; where the weight is 0 the key means nothing


def attention_statistics(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    top_k: int = 0,
    block: int = 128,
    **options: Unpack[AttentionOptions],
) -> AttentionStatistics:
    """Per-key attention mass and the top keys of each query, without ever holding the attention matrix.

    Queries are taken ``block`` at a time: memory is ``batch · heads_q · block · seq_k`` beside the result. Weights are
    those before dropout; nothing here has a gradient.

    Args:
        query, key, lse: as :func:`attention_weights`.
        top_k: how many keys to name per query; 0: none. At most ``seq_k``.
        block: queries at a time. Default: 128.
        options: of the :func:`fastattn.attention` call, except dropout.

    Raises:
        TypeError, ValueError: as :func:`attention_weights`.
    """
    if given := {"dropout_p", "dropout_seed"} & options.keys():
        raise TypeError(f"attention_statistics does not take {', '.join(sorted(given))}")
    check_length("top_k", top_k)
    if check_length("block", block) == 0:
        raise ValueError("block must be at least 1, got 0")
    with torch.no_grad():
        arguments, batch = prepare_options("attention_statistics", query, key, key, options)
        _check_lse(lse, query, arguments, batch)
        seqlen_q, seqlen_k = arguments.q.shape[2], arguments.k.shape[2]
        if top_k > seqlen_k:
            raise ValueError(f"top_k must be at most the {seqlen_k} keys, got {top_k}")
        mass = torch.zeros(*arguments.q.shape[:2], seqlen_k, dtype=lse.dtype, device=lse.device)
        found = []
        for start in range(0, seqlen_q, block):
            p = _block(arguments, lse, slice(start, min(start + block, seqlen_q)))
            mass += p.sum(2)
            if top_k:
                found.append(p.topk(top_k, dim=-1))
        parts = [torch.cat(x, dim=2) for x in zip(*found, strict=True)] if found else [None, None]
    weights, keys = (None if x is None else unfold(x, query, batch) for x in parts)
    return AttentionStatistics(unfold(mass, query, batch), weights, keys)
