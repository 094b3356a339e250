"""The forward kernels: an online softmax over the tiles of keys that a tile of queries sees, whole or in splits.

Where some key is invisible to some query, 0 * NaN or 0 * inf may enter a sum that must not see it. The kernels look at
their sums once, at the end, and mark the tiles that are not finite in ``broken``; a second launch, with CAREFUL, does
the marked tiles again by :func:`careful_product`. Apart from the launch that costs nothing.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.scores import LN2, LOG2E, exponential, kept, queries, scores
from fastattn.backends.triton.sequences import (
    SIZES,
    Extras,
    Sizes,
    key_tile,
    key_tiles,
    sequence,
    statistics_row,
)
from fastattn.backends.triton.tiles import (
    INF,
    Pages,
    add_product,
    at,
    careful_product,
    describe,
    has_nonfinite,
    load_keys,
    load_rows,
    matmul,
    negated,
    plus,
    store_rows,
    times,
    zeros,
)


@triton.jit
def _attend(
    state, first, last, gap, q, k, v, k_described, v_described, pages, rows, b, seq, x, sizes, scales,
    F: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Takes the keys [0, gap) and [first, last) into ``state``: acc (BLOCK_M, D), sum (BLOCK_M), maximum (BLOCK_M)."""
    acc, total, maximum = state
    # Counting from 0: Triton 3.9 does not pipeline a loop whose first index depends on another loop.
    for t in tl.range(0, tl.cdiv(last - first + gap, BLOCK_N), warp_specialize=SPECIALIZE):
        start_n = key_tile(t, first, gap, BLOCK_N, F)
        k_tile = load_keys(k, k_described, pages, start_n, seq.k_first, seq.k_len, BLOCK_N, F.QK, F, EDGE, DESCRIPTORS)
        qk = matmul(q, k_tile, F.QK, F)
        j = (start_n + tl.arange(0, BLOCK_N))[None, :]
        if EDGE or F.SHAPED:
            s, visible, _ = scores(qk, rows, j, b, seq, x, sizes, scales, F, EDGE)
            if EDGE or F.HIDDEN:
                s = tl.where(visible, s, -INF)
            new_maximum = tl.maximum(maximum, tl.max(s, 1))
            # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
            pivot = tl.where(new_maximum == -INF, 0.0, new_maximum)
            p = exponential(s - pivot[:, None], F)
        else:
            # scale >= 0 (the sign is in q), so the maximum scales; scale and pivot go into one multiply-add.
            visible = None
            new_maximum = tl.maximum(maximum, tl.max(qk, 1) * scales.scores)
            pivot = new_maximum
            p = tl.exp2(qk * scales.scores - pivot[:, None])
        shrink = exponential(maximum - pivot, F)
        total = total * shrink + tl.sum(p, 1)
        acc = times(acc, shrink[:, None], F.V)
        if F.DROPOUT:
            p = tl.where(kept(rows.i, rows.head, start_n, x.seed, sizes.threshold, BLOCK_N), p, 0.0)
        if CAREFUL:
            acc = careful_product(acc, p, visible, v, pages, start_n, seq.k_len, BLOCK_N, F.V, F.PAGED)
        else:
            v_tile = load_keys(
                v, v_described, pages, start_n, seq.k_first, seq.k_len, BLOCK_N, F.V, F, EDGE, DESCRIPTORS
            )
            acc = add_product(acc, p, v_tile, F.V, F)
        maximum = new_maximum
    return acc, total, maximum


@triton.jit
def _add_sink(state, sink, F: tl.constexpr):
    """A key of score ``sink`` (in units of the scores) and value zero."""
    acc, total, maximum = state
    new_maximum = tl.maximum(maximum, sink)
    pivot = tl.where(new_maximum == -INF, 0.0, new_maximum)  # a sink may be -inf, and a row see nothing
    shrink = exponential(maximum - pivot, F)
    total = total * shrink + exponential(sink - pivot, F)
    return times(acc, shrink[:, None], F.V), total, new_maximum


@triton.jit
def _log_sum(total, maximum, F: tl.constexpr):
    """The natural logarithm of a sum of exponentials."""
    if F.BIAS != "none":
        value = maximum + tl.log2(total) * LN2
    else:
        value = (maximum + tl.log2(total)) * LN2
    return tl.where(total == 0.0, -INF, value)


@triton.jit(do_not_specialize=["lse", *SIZES])
def forward_kernel(
    q,  # Matrix (batch, heads_q, seqlen_q, head_dim_qk)
    k,  # Matrix (batch, heads_k, seqlen_k, head_dim_qk), or (pages, heads_k, page_size, head_dim_qk)
    v,  # like k, head_dim_v
    mask,  # Matrix (batch, heads_q, seqlen_q, seqlen_k) of uint8, nonzero = visible, or None
    bias,  # Matrix (batch, heads_q, seqlen_q, seqlen_k), or None
    x,  # Extras without mask and bias
    out,  # Matrix (batch, heads_q, seqlen_q, head_dim_v); with SPLIT (splits, ...) of float32
    lse,  # (batch, heads_q, rows_q) of float32, contiguous; with SPLIT (2, splits, ...): maxima, and sums
    broken,  # (splits, rows of programs, tiles of FLAG_BLOCK) uint8: the tile holds NaN or inf; None if not RESTRICTED
    batch, heads_q, group, seqlen_q, seqlen_k, rows_q, lo, hi, offset, page_size, splits, threshold,
    slopes_step, q_segments_step, k_segments_step, pages_step,
    scales,
    F: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAG_BLOCK: tl.constexpr,  # BLOCK_M and BLOCK_N of the launch without CAREFUL
    SHARE_BLOCK: tl.constexpr,
    CAREFUL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries of one head, or (PACK) of all heads that share a key head; and per split of keys.

    Without CAREFUL every tile, marking the broken ones; with it, the broken ones again.
    """
    sizes = Sizes(
        batch, heads_q, group, seqlen_q, seqlen_k, rows_q, lo, hi, offset, page_size, splits, threshold,
        slopes_step, q_segments_step, k_segments_step, pages_step,
    )  # fmt: skip
    x = Extras(mask, bias, *x)
    pack = sizes.group if F.PACK else 1
    tiles = tl.cdiv(sizes.seqlen_q * pack, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if F.HAS_HI:
        tile = tiles - 1 - tile  # later queries see more keys: longest first
    start_m = tile * BLOCK_M
    line = tl.program_id(0) // tiles  # split, batch entry and head
    if F.RESTRICTED:
        broken += line.to(tl.int64) * tl.cdiv(sizes.seqlen_q * pack, FLAG_BLOCK) + start_m // FLAG_BLOCK
        if CAREFUL:
            if tl.load(broken) == 0:
                return
    split = 0
    if SPLIT:
        split = line % sizes.splits
        line = line // sizes.splits
    heads = sizes.heads_q // pack
    b = line // heads
    first_head = line % heads * pack
    h = first_head
    hk = h // sizes.group
    seq = sequence(b, x, sizes, F)
    if F.CU_Q:
        if start_m >= seq.q_len * pack:
            return
    r = start_m + tl.arange(0, BLOCK_M)
    exists = r < seq.q_len * pack
    i = r
    if F.PACK:
        i = r // pack
        h += r % pack
    pointers = q.data + tl.cast(b, tl.int64) * q.stride[0] + tl.cast(h, tl.int64) * q.stride[1]
    pointers += (tl.cast(seq.q_start, tl.int64) + i) * q.stride[2]
    q_tile = load_rows(pointers, q.stride[3], exists, F.QK, True)
    if F.NEGATE:
        q_tile = negated(q_tile, F.QK)
    column = h
    if F.PACK:
        column = h[:, None]
    rows = queries(b, column, i[:, None], seq, x, sizes, F)
    pages = Pages(None, 0)
    if F.PAGED:
        pages = Pages(x.pages + tl.cast(b, tl.int64) * sizes.pages_step, sizes.page_size)
        k = at(k, 0, hk, 0)
        v = at(v, 0, hk, 0)
    else:
        k = at(k, b, hk, seq.k_start)
        v = at(v, b, hk, seq.k_start)
    k_described, v_described = None, None
    if DESCRIPTORS:
        k_described = describe(k, seq.k_len, BLOCK_N, F.QK)
        v_described = describe(v, seq.k_len, BLOCK_N, F.V)

    # Of the whole tile that a CAREFUL program does a part of: the keys of each split have to be the same.
    start_m = start_m // FLAG_BLOCK * FLAG_BLOCK
    first = start_m // pack
    last = tl.minimum((start_m + FLAG_BLOCK - 1) // pack, seq.q_len - 1)
    # Packed heads share their mask of keys.
    gap, begin, full_begin, full_end, end = key_tiles(
        first, last, b, first_head, seq, x, sizes, FLAG_BLOCK, SHARE_BLOCK, F
    )
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, SHARE_BLOCK), sizes.splits) * SHARE_BLOCK
        share_end = begin + (split + 1) * share
        begin += split * share
        full_begin = tl.maximum(full_begin, begin)
        full_end = tl.maximum(tl.minimum(full_end, share_end), full_begin)
        end = tl.minimum(end, share_end)
    state = (zeros(BLOCK_M, F.V), tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), -INF, tl.float32))
    if CAREFUL:
        state = _attend(
            state, begin, end, gap, q_tile, k, v, k_described, v_described, pages, rows, b, seq, x, sizes, scales,
            F, BLOCK_N, True, True, False, False,
        )  # fmt: skip
    else:
        if F.EDGE_FIRST:
            state = _attend(
                state, begin, tl.minimum(full_begin, end), gap, q_tile, k, v, k_described, v_described, pages, rows, b,
                seq, x, sizes, scales, F, BLOCK_N, True, False, DESCRIPTORS, SPECIALIZE,
            )  # fmt: skip
        state = _attend(
            state, full_begin, full_end, 0, q_tile, k, v, k_described, v_described, pages, rows, b,
            seq, x, sizes, scales, F, BLOCK_N, False, False, DESCRIPTORS, SPECIALIZE,
        )  # fmt: skip
        state = _attend(
            state, full_end, end, 0, q_tile, k, v, k_described, v_described, pages, rows, b,
            seq, x, sizes, scales, F, BLOCK_N, True, False, DESCRIPTORS, SPECIALIZE,
        )  # fmt: skip
    if F.RESTRICTED and not CAREFUL:
        tl.store(broken, has_nonfinite(state[0], exists, F.V).to(tl.uint8))
    if F.SINKS and not SPLIT:
        sink = tl.load(x.sinks + h).to(tl.float32)
        state = _add_sink(state, sink if F.BIAS != "none" else sink * LOG2E, F)
    acc, total, maximum = state

    weight = 1.0 / tl.where(total == 0.0, 1.0, total)
    if F.DROPOUT:
        weight *= scales.dropout
    own = statistics_row(b, h, seq, sizes, F) + i
    row = tl.cast(seq.q_start, tl.int64) + i
    pointers = out.data + tl.cast(b, tl.int64) * out.stride[0] + tl.cast(h, tl.int64) * out.stride[1]
    if SPLIT:
        lines = sizes.heads_q if F.CU_Q else sizes.batch * sizes.heads_q
        behind = split * (tl.cast(lines, tl.int64) * sizes.rows_q)
        pointers += behind * F.V.DIM
        own += behind
        # Their logarithm would not do: next to a maximum of finfo.min or 1e6 a sum is rounded away.
        tl.store(lse + own, maximum, mask=exists)
        tl.store(lse + own + sizes.splits * (tl.cast(lines, tl.int64) * sizes.rows_q), total, mask=exists)
    else:
        tl.store(lse + own, _log_sum(total, maximum, F), mask=exists)
    store_rows(out, pointers + row * out.stride[2], times(acc, weight[:, None], F.V), exists, F.V)


@triton.jit(do_not_specialize=["statistics", "lse", "sinks", "count", "heads_q", "rows_q", "splits"])
def combine_kernel(
    parts,  # (splits, rows, head_dim_v) of float32, contiguous; a row is a batch entry, head and query
    statistics,  # (2, splits, rows) of float32, contiguous: maxima of scores, sums of exponentials
    out,  # Matrix (batch, heads_q, seqlen_q, head_dim_v)
    lse,  # (rows), contiguous
    sinks,  # (heads_q), or None
    count,  # of rows: batch * heads_q * rows_q
    heads_q,
    rows_q,
    splits,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out and lse of rows whose keys were split: means of the parts, weighted by their sums of exponentials."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    i = row % rows_q
    h = row // rows_q % heads_q
    b = row // rows_q // heads_q
    row = row.to(tl.int64)
    count = tl.cast(count, tl.int64)
    sums = statistics + splits * count
    acc, total, maximum = zeros(BLOCK, F.V), tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), -INF, tl.float32)
    for s in tl.range(0, splits):
        part_maximum = tl.load(statistics + s * count + row, mask=exists, other=-INF)
        part_total = tl.load(sums + s * count + row, mask=exists, other=0.0)
        part = load_rows(parts + (s * count + row) * F.V.DIM, 1, exists, F.V, True)
        new_maximum = tl.maximum(maximum, part_maximum)
        pivot = tl.where(new_maximum == -INF, 0.0, new_maximum)
        shrink = exponential(maximum - pivot, F)
        weight = part_total * exponential(part_maximum - pivot, F)
        total = total * shrink + weight
        acc = plus(times(acc, shrink[:, None], F.V), times(part, weight[:, None], F.V), F.V)
        maximum = new_maximum
    if F.SINKS:
        sink = tl.load(sinks + h, mask=exists, other=0.0)
        acc, total, maximum = _add_sink((acc, total, maximum), sink if F.BIAS != "none" else sink * LOG2E, F)
    acc = times(acc, (1.0 / tl.where(total == 0.0, 1.0, total))[:, None], F.V)
    pointers = out.data + b.to(tl.int64) * out.stride[0] + h.to(tl.int64) * out.stride[1]
    store_rows(out, pointers + i.to(tl.int64) * out.stride[2], acc, exists, F.V)
    tl.store(lse + row, _log_sum(total, maximum, F), mask=exists)
