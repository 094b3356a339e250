"""Attention to a cache of keys and values, for decoding: appended in place, dense or paged."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import checks, ops
from fastattn.call import combine_window, shaping
from fastattn.ragged import Ragged, prepare_ragged
from fastattn.spec import Window, check_shapes, check_tensors, dtype_names
from fastattn.validate import check_block_table, check_dense, check_flag, check_integers, check_length


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of the first ``rotary_dim`` features.

    Pair ``n`` of features, ``(2n, 2n + 1)`` when ``interleaved``, else ``(n, n + rotary_dim / 2)``, is turned by its
    angle: ``(a cos - b sin, a sin + b cos)``, computed in float32 (float64 for float64 inputs).

    Args:
        x: ``(batch, heads, seq, head_dim)``.
        cos, sin: ``(batch or 1, seq, rotary_dim / 2)``, of the angles at each position.
    """
    check_flag("interleaved", interleaved)
    half = cos.shape[-1]
    if 2 * half > x.shape[3] or cos.shape != sin.shape:
        raise ValueError(
            f"rotary cos and sin must have one shape and at most head_dim / 2 = {x.shape[3] // 2} columns; got "
            f"{tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    cos, sin = (y.to(wide).unsqueeze(1) for y in (cos, sin))
    turned = x[..., : 2 * half].to(wide)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.split(half, dim=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)


def append(cache: Tensor, new: Tensor, lengths: int | Tensor, block_table: Tensor | None = None) -> None:
    """Write ``new (batch, heads, n, dim)`` behind the ``lengths`` rows that each sequence of ``cache`` holds, in place.

    ``cache`` is ``(batch, heads, capacity, dim)``, or ``(num_pages, heads, page_size, dim)`` with a ``block_table``.
    """
    count = new.shape[2]
    if block_table is None and not isinstance(lengths, Tensor):
        cache[:, :, lengths : lengths + count].copy_(new)
        return
    rows = torch.arange(count, device=new.device)
    rows = (rows + (lengths[:, None] if isinstance(lengths, Tensor) else lengths)).expand(new.shape[0], count).long()
    if block_table is None:
        first = torch.arange(new.shape[0], device=new.device)[:, None].expand(rows.shape)
    else:
        first, rows = block_table.gather(1, rows // cache.shape[2]).long(), rows % cache.shape[2]
    cache.transpose(1, 2).index_put_((first, rows), new.transpose(1, 2))


def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_segments: Tensor | None = None,
    k_segments: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries to a cache, to which new keys and values may be appended first, in place.

    Sequence ``b`` holds ``cache_seqlens[b]`` keys before the call, and ``cache_seqlens[b] + seq_new`` during it;
    ``cache_seqlens`` itself is not changed. ``causal`` and ``window`` are aligned to the last key of each sequence.

    Args:
        query: ``(batch, heads_q, seq_q, head_dim_qk)``; a few queries (speculative decoding) or many (prefill).
        key_cache: ``(batch, heads_k, capacity, head_dim_qk)``, any strides; with ``block_table``
            ``(num_pages, heads_k, page_size, head_dim_qk)``, any page size.
        value_cache: likewise, with ``head_dim_v``.
        key, value: ``(batch, heads_k, seq_new, head_dim)``, appended; both or neither.
        cache_seqlens: keys in the cache: an int, or integers ``(batch,)``. Default: all of a dense cache when nothing
            is appended; needed otherwise.
        leftpad_k: integers ``(batch,)``: the first keys of each sequence that are padding, invisible.
        block_table: int32 ``(batch, pages)``: key ``j`` of sequence ``b`` is row ``j % page_size`` of page
            ``block_table[b, j // page_size]``.
        rotary_cos, rotary_sin: ``(positions, rotary_dim / 2)``: turn the appended keys, at their positions in the
            cache, and the queries: at ``cache_seqlens + i`` when causal or windowed, else all at ``cache_seqlens``.
        rotary_interleaved: pairs of features are neighbours; False: the first half with the second. Default: True.
        mask, bias, causal, window, softmax_scale, softcap, alibi_slopes, sinks, q_segments, k_segments, prefix_lens,
            return_lse, backend: as in :func:`fastattn.attention`, where keys are all that the cache has room for:
            masks broadcast to ``(batch, heads_q, seq_q, capacity)``, ``k_segments`` are ``(batch or 1, capacity)``.
            When ``cache_seqlens`` is an int, only the keys held need be given.
        num_splits: parts that the keys are split into, computed side by side; 0: the kernel chooses. Changes speed
            and rounding, not meaning.

    Returns:
        ``(batch, heads_q, seq_q, head_dim_v)``; with ``return_lse`` also ``(batch, heads_q, seq_q)``.

    Raises:
        TypeError, ValueError: as :func:`fastattn.attention`; also when the cache is too short (as far as that can be
            told without its lengths: see :func:`fastattn.debug_checks`), or an input asks for a gradient while keys
            are appended or paged.
    """
    check_flag("return_lse", return_lse)
    check_flag("rotary_interleaved", rotary_interleaved)
    check_tensors(query, key_cache, value_cache, names=("query", "key_cache", "value_cache"))
    for name, x in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
    check_shapes(query, key_cache, value_cache)
    batch, capacity = query.shape[0], key_cache.shape[2]
    if block_table is not None:
        check_block_table(block_table, query, batch)
        capacity *= block_table.shape[1]
    elif key_cache.shape[0] != batch:
        raise ValueError(f"the cache must have the query's batch {batch}, got {tuple(key_cache.shape)}")
    lengths = _lengths(cache_seqlens, query, batch, capacity, appends=key is not None, paged=block_table is not None)
    if leftpad_k is not None:
        check_integers("leftpad_k", leftpad_k, query, (batch,))
        leftpad_k = leftpad_k.to(torch.int32).expand(batch)
    used = lengths
    if key is not None or value is not None:
        _check_new(query, key_cache, value_cache, key, value)
        assert key is not None and value is not None
        used = lengths + key.shape[2]
    if rotary_cos is not None or rotary_sin is not None:
        query, key = _rotate(query, key, lengths, rotary_cos, rotary_sin, rotary_interleaved, causal or window)
    grad = (query, key, value, key_cache, value_cache)  # turned by tables that may ask for one
    if key is not None and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in grad):
        raise ValueError("appending to a cache in place has no gradient: call it under torch.no_grad()")
    _check_room(lengths, 0 if key is None else key.shape[2], capacity)
    k, v = key_cache, value_cache
    if block_table is None and not isinstance(used, Tensor):
        k, v = k[:, :, :used], v[:, :, :used]
        mask, bias, k_segments = (
            x[..., :used] if isinstance(x, Tensor) and x.shape[-1:] == (capacity,) else x
            for x in (mask, bias, k_segments)
        )
        seqused, capacity = None, used
    else:
        seqused = used if isinstance(used, Tensor) else query.new_full((batch,), used, dtype=torch.int32)
    arguments = prepare_ragged(
        query,
        k,
        v,
        Ragged(None, None, seqused, leftpad_k, block_table, 0, capacity, check_length("num_splits", num_splits)),
        mask,
        bias,
        combine_window(causal, window),
        None,
        softmax_scale,
        0.0,
        None,
        backend,
        shaping(softcap, alibi_slopes, sinks, q_segments, k_segments, prefix_lens),
    )
    if key is not None and value is not None:  # only now that nothing can be refused any more
        append(key_cache, key, lengths, block_table)
        append(value_cache, value, lengths, block_table)
    out, lse = ops.run_forward(*arguments[:6], *arguments.call)
    return (out, lse) if return_lse else out


def _lengths(
    cache_seqlens: int | Tensor | None, q: Tensor, batch: int, capacity: int, appends: bool, paged: bool
) -> int | Tensor:
    if cache_seqlens is None:
        if appends or paged:
            raise ValueError("cache_seqlens is needed to append to a cache or to read a paged one")
        return capacity
    if isinstance(cache_seqlens, Tensor):
        check_integers("cache_seqlens", cache_seqlens, q, (batch,))
        return cache_seqlens.to(torch.int32).expand(batch)
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.SymInt)):
        raise TypeError(f"cache_seqlens must be an int or a tensor of integers (batch,), got {cache_seqlens!r}")
    if check_length("cache_seqlens", cache_seqlens) > capacity:
        raise ValueError(
            f"cache_seqlens must be at most {capacity}, the keys that the cache holds, got {cache_seqlens}"
        )
    return cache_seqlens


def _check_new(q: Tensor, key_cache: Tensor, value_cache: Tensor, key: Tensor | None, value: Tensor | None) -> None:
    if key is None or value is None:
        raise ValueError("key and value are appended together; got one of them")
    for name, x, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a torch.Tensor (batch, heads_k, seq_new, head_dim), got {got}")
        expected = (q.shape[0], cache.shape[1], key.shape[2], cache.shape[3])
        if tuple(x.shape) != expected or x.dtype != cache.dtype or x.device != cache.device:
            raise ValueError(
                f"{name} must be {expected} of {cache.dtype} on {cache.device}, like its cache {tuple(cache.shape)}; "
                f"got {tuple(x.shape)} of {x.dtype} on {x.device}"
            )


def _check_room(lengths: int | Tensor, new: int, capacity: int) -> None:
    if not isinstance(lengths, Tensor):
        if lengths + new > capacity:
            raise ValueError(f"the cache has room for {capacity} keys: {lengths} used, {new} new")
    elif checks.enabled():
        what = f"to leave room for {new} new keys of {capacity}" if new else "the keys that the cache holds"
        checks.check_lengths("cache_seqlens", lengths, capacity - new, what)


def _rotate(
    q: Tensor,
    k: Tensor | None,
    lengths: int | Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    moves: object,
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor) or cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            "rotary_cos and rotary_sin must both be given, as tensors of one shape (positions, rotary_dim / 2)"
        )
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_dense(name, x, q)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating, got {dtype_names((x.dtype,))}")
    count = max(q.shape[2] if moves else 1, 0 if k is None else k.shape[2])
    if not isinstance(lengths, Tensor):
        if lengths + count > cos.shape[0]:
            raise ValueError(f"rotary_cos and rotary_sin have {cos.shape[0]} positions, {lengths + count} are needed")
    elif checks.enabled():
        what = f"rotary_cos and rotary_sin have {cos.shape[0]} positions"
        checks.check_lengths("cache_seqlens", lengths, cos.shape[0] - count, what)
    start = lengths[:, None].long() if isinstance(lengths, Tensor) else lengths

    def at(count: int, step: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(count, device=q.device) * step + start
        positions = positions if positions.dim() == 2 else positions[None]
        return cos[positions], sin[positions]

    q = apply_rotary(q, *at(q.shape[2], 1 if moves else 0), interleaved)
    return q, k if k is None else apply_rotary(k, *at(k.shape[2], 1), interleaved)
