"""The backward kernels. With P the probabilities, M = keep / (1 - dropout_p) (1 without dropout), scale the softmax's,
and C the derivative of the softcap, 1 - tanh^2 (1 without one):

    dP = M * (dO V^T)     dS = P * (dP - delta), 0 where invisible     delta = rowsum(dO * O) - dlse
    dV = (M * P)^T dO     dQ = scale (dS C) K     dK = scale (dS C)^T Q     dbias = dS, summed over what was broadcast

Every output tile has one program that recomputes the P it needs from lse, so each pass is deterministic.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.scores import LOG2E, exponential, kept, queries, scores
from fastattn.backends.triton.sequences import (
    SIZES,
    Extras,
    Sizes,
    key_tile,
    key_tiles,
    query_tiles,
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
    load_tile,
    matmul,
    only,
    store_rows,
    times,
    zeros,
)


@triton.jit(do_not_specialize=["grad_lse", "delta", "heads_q", "rows_q"])
def delta_kernel(
    out,  # Matrix (batch, heads_q, rows, head_dim_v)
    grad_out,  # like out
    grad_lse,  # (batch, heads_q, rows), contiguous, or None
    delta,  # (batch, heads_q, rows) float32, contiguous
    heads_q,
    rows_q,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(dO * O) - dlse."""
    tiles = tl.cdiv(rows_q, BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b = bh // heads_q
    h = bh % heads_q
    o = load_tile(at(out, b, h, 0), start_m, rows_q, BLOCK_M, F.V, True)
    do = load_tile(at(grad_out, b, h, 0), start_m, rows_q, BLOCK_M, F.V, True)
    value = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if F.V.TAIL != 0:
        value += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    i = start_m + tl.arange(0, BLOCK_M)
    if grad_lse is not None:
        value -= tl.load(grad_lse + bh * rows_q + i, mask=i < rows_q, other=0.0).to(tl.float32)
    tl.store(delta + bh * rows_q + i, value, mask=i < rows_q)


@triton.jit
def load_statistics(lse, delta, b, h, i, seq, sizes, F: tl.constexpr):
    """lse, in units of the scores, and delta of the queries ``i``. lse is +inf where a row sees nothing: P = 0."""
    row = statistics_row(b, h, seq, sizes, F) + i
    row_lse = tl.load(lse + row, mask=i < seq.q_len, other=-INF)
    row_delta = tl.load(delta + row, mask=i < seq.q_len, other=0.0)
    row_lse = tl.where(row_lse == -INF, INF, row_lse)
    if F.BIAS == "none":
        row_lse *= LOG2E
    return row_lse, row_delta


@triton.jit
def gradient(
    qk, dp, row_lse, row_delta, keep, rows, j, b, seq, x, sizes, scales, F: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """M P, dS, dS C and visibility of a tile, in the orientation of ``qk``; ``row_lse`` and ``row_delta`` broadcast."""
    s, visible, steepness = scores(qk, rows, j, b, seq, x, sizes, scales, F, EDGE)
    p = exponential(s - row_lse, F)
    if EDGE or F.HIDDEN:
        p = tl.where(visible, p, 0.0)
    weights = p
    if F.DROPOUT:
        weights = tl.where(keep, p * scales.dropout, 0.0)
        dp = tl.where(keep, dp * scales.dropout, 0.0)
    ds = p * (dp - row_delta)
    if EDGE or F.HIDDEN:
        # The value of an invisible key may be NaN.
        ds = tl.where(visible, ds, 0.0)
    dqk = ds
    if F.SOFTCAP:
        dqk = ds * steepness
        if EDGE or F.HIDDEN:
            dqk = tl.where(visible, dqk, 0.0)
    return weights, ds, dqk, visible


@triton.jit
def _dkdv_queries(
    dk, dv, first, last, k_tile, v_tile, q, grad_out, lse, delta, b, hk, start_n, seq, x, sizes, scales,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Adds to dk, dv (BLOCK_N, D) what the queries [first, last) of the heads that share the key head contribute.

    Tiles are (keys, queries). The loop is over heads and tiles of queries at once: one pipeline, fewer registers.
    """
    j = (start_n + tl.arange(0, BLOCK_N))[:, None]
    tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    for t in tl.range(0, tiles * sizes.group):
        h = hk * sizes.group + t // tiles
        start_m = first + t % tiles * BLOCK_M
        q_head = at(q, b, h, seq.q_start)
        grad_out_head = at(grad_out, b, h, seq.q_start)
        q_tile = load_tile(q_head, start_m, seq.q_len, BLOCK_M, F.QK, EDGE)
        do = load_tile(grad_out_head, start_m, seq.q_len, BLOCK_M, F.V, EDGE)
        i = start_m + tl.arange(0, BLOCK_M)
        row_lse, row_delta = load_statistics(lse, delta, b, h, i, seq, sizes, F)
        rows = queries(b, h, i[None, :], seq, x, sizes, F)
        kq = matmul(k_tile, q_tile, F.QK, F)
        dp = matmul(v_tile, do, F.V, F)
        keep = None
        if F.DROPOUT:
            keep = tl.trans(kept(i[:, None], rows.head, start_n, x.seed, sizes.threshold, BLOCK_N))
        weights, _, dqk, visible = gradient(
            kq, dp, row_lse[None, :], row_delta[None, :], keep, rows, j, b, seq, x, sizes, scales, F, EDGE
        )
        if CAREFUL:
            pages = Pages(None, 0)
            dv = careful_product(dv, weights, visible, grad_out_head, pages, start_m, seq.q_len, BLOCK_M, F.V, False)
            dk = careful_product(dk, dqk, visible, q_head, pages, start_m, seq.q_len, BLOCK_M, F.QK, False)
        else:
            dv = add_product(dv, weights, do, F.V, F)
            dk = add_product(dk, dqk, q_tile, F.QK, F)
    return dk, dv


@triton.jit(do_not_specialize=["lse", "delta", *SIZES])
def dkdv_kernel(
    q, k, v, mask, bias, x, grad_out, lse, delta, dk, dv,
    broken,  # (batch * heads_k, tiles of FLAG_BLOCK keys) uint8: the tile holds NaN or inf; None if not RESTRICTED
    batch, heads_q, group, seqlen_q, seqlen_k, rows_q, lo, hi, offset, page_size, splits, threshold,
    slopes_step, q_segments_step, k_segments_step, pages_step,
    scales,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAG_BLOCK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys of one key head."""
    sizes = Sizes(
        batch, heads_q, group, seqlen_q, seqlen_k, rows_q, lo, hi, offset, page_size, splits, threshold,
        slopes_step, q_segments_step, k_segments_step, pages_step,
    )  # fmt: skip
    x = Extras(mask, bias, *x)
    tiles = tl.cdiv(sizes.seqlen_k, BLOCK_N)
    start_n = tl.program_id(0) % tiles * BLOCK_N
    line = tl.program_id(0) // tiles
    if F.RESTRICTED:
        broken += line.to(tl.int64) * tl.cdiv(sizes.seqlen_k, FLAG_BLOCK) + start_n // FLAG_BLOCK
        if CAREFUL:
            if tl.load(broken) == 0:
                return
    heads_k = sizes.heads_q // sizes.group
    b = line // heads_k
    hk = line % heads_k
    seq = sequence(b, x, sizes, F)
    held = sizes.seqlen_k  # rows of k and v that exist, used or not
    if F.CU_K:
        held = tl.load(x.cu_k + b + 1) - seq.k_start
        if start_n >= held:
            return
    j = start_n + tl.arange(0, BLOCK_N)
    k_tile = load_tile(at(k, b, hk, seq.k_start), start_n, seq.k_len, BLOCK_N, F.QK, True)
    v_tile = load_tile(at(v, b, hk, seq.k_start), start_n, seq.k_len, BLOCK_N, F.V, True)
    last = tl.minimum(start_n + BLOCK_N, seq.k_len) - 1
    _, begin, full_begin, full_end, end = query_tiles(start_n, last, b, hk, seq, x, sizes, BLOCK_N, BLOCK_M, F)
    dk_acc = zeros(BLOCK_N, F.QK)
    dv_acc = zeros(BLOCK_N, F.V)
    if CAREFUL:
        dk_acc, dv_acc = _dkdv_queries(
            dk_acc, dv_acc, begin, end, k_tile, v_tile, q, grad_out, lse, delta, b, hk, start_n, seq, x, sizes, scales,
            F, BLOCK_M, BLOCK_N, True, True,
        )  # fmt: skip
    else:
        if F.EDGE_FIRST_QUERIES:
            dk_acc, dv_acc = _dkdv_queries(
                dk_acc, dv_acc, begin, tl.minimum(full_begin, end), k_tile, v_tile, q, grad_out, lse, delta,
                b, hk, start_n, seq, x, sizes, scales, F, BLOCK_M, BLOCK_N, True, False,
            )  # fmt: skip
        dk_acc, dv_acc = _dkdv_queries(
            dk_acc, dv_acc, full_begin, full_end, k_tile, v_tile, q, grad_out, lse, delta,
            b, hk, start_n, seq, x, sizes, scales, F, BLOCK_M, BLOCK_N, False, False,
        )  # fmt: skip
        dk_acc, dv_acc = _dkdv_queries(
            dk_acc, dv_acc, full_end, end, k_tile, v_tile, q, grad_out, lse, delta,
            b, hk, start_n, seq, x, sizes, scales, F, BLOCK_M, BLOCK_N, True, False,
        )  # fmt: skip
    if F.RESTRICTED and not CAREFUL:
        used = (j >= seq.k_first) & (j < seq.k_len)
        flag = has_nonfinite(dk_acc, used, F.QK) | has_nonfinite(dv_acc, used, F.V)
        tl.store(broken, flag.to(tl.uint8))
    dk_acc = times(dk_acc, scales.softmax, F.QK)
    if F.USED_K or F.LEFTPAD:
        used = ((j >= seq.k_first) & (j < seq.k_len))[:, None]
        dk_acc = only(dk_acc, used, F.QK)
        dv_acc = only(dv_acc, used, F.V)
    dk = at(dk, b, hk, seq.k_start)
    dv = at(dv, b, hk, seq.k_start)
    store_rows(dk, dk.data + j.to(tl.int64) * dk.stride[2], dk_acc, j < held, F.QK)
    store_rows(dv, dv.data + j.to(tl.int64) * dv.stride[2], dv_acc, j < held, F.V)


@triton.jit
def _dq_keys(
    dq, first, last, gap, q_tile, do, row_lse, row_delta, k, v, k_described, v_described, rows, b, seq, x,
    sizes, scales,
    F: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds to dq (BLOCK_M, D) what the keys [0, gap) and [first, last) contribute."""
    pages = Pages(None, 0)
    # Counting from 0: Triton 3.9 does not pipeline a loop whose first index depends on another loop.
    for t in tl.range(0, tl.cdiv(last - first + gap, BLOCK_N)):
        start_n = key_tile(t, first, gap, BLOCK_N, F)
        k_tile = load_keys(k, k_described, pages, start_n, seq.k_first, seq.k_len, BLOCK_N, F.QK, F, EDGE, DESCRIPTORS)
        v_tile = load_keys(v, v_described, pages, start_n, seq.k_first, seq.k_len, BLOCK_N, F.V, F, EDGE, DESCRIPTORS)
        qk = matmul(q_tile, k_tile, F.QK, F)
        dp = matmul(do, v_tile, F.V, F)
        keep = None
        if F.DROPOUT:
            keep = kept(rows.i, rows.head, start_n, x.seed, sizes.threshold, BLOCK_N)
        j = (start_n + tl.arange(0, BLOCK_N))[None, :]
        _, _, dqk, visible = gradient(
            qk, dp, row_lse[:, None], row_delta[:, None], keep, rows, j, b, seq, x, sizes, scales, F, EDGE
        )
        if CAREFUL:
            dq = careful_product(dq, dqk, visible, k, pages, start_n, seq.k_len, BLOCK_N, F.QK, False)
        else:
            dq = add_product(dq, dqk, k_tile, F.QK, F)
    return dq


@triton.jit(do_not_specialize=["lse", "delta", *SIZES])
def dq_kernel(
    q, k, v, mask, bias, x, grad_out, lse, delta, dq,
    broken,  # (batch * heads_q, tiles of FLAG_BLOCK queries) uint8: the tile holds NaN or inf; None if not RESTRICTED
    batch, heads_q, group, seqlen_q, seqlen_k, rows_q, lo, hi, offset, page_size, splits, threshold,
    slopes_step, q_segments_step, k_segments_step, pages_step,
    scales,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAG_BLOCK: tl.constexpr, CAREFUL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries of one head."""
    sizes = Sizes(
        batch, heads_q, group, seqlen_q, seqlen_k, rows_q, lo, hi, offset, page_size, splits, threshold,
        slopes_step, q_segments_step, k_segments_step, pages_step,
    )  # fmt: skip
    x = Extras(mask, bias, *x)
    tiles = tl.cdiv(sizes.seqlen_q, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if F.HAS_HI:
        tile = tiles - 1 - tile  # longest first
    start_m = tile * BLOCK_M
    line = tl.program_id(0) // tiles
    if F.RESTRICTED:
        broken += line.to(tl.int64) * tl.cdiv(sizes.seqlen_q, FLAG_BLOCK) + start_m // FLAG_BLOCK
        if CAREFUL:
            if tl.load(broken) == 0:
                return
    b = line // sizes.heads_q
    h = line % sizes.heads_q
    hk = h // sizes.group
    seq = sequence(b, x, sizes, F)
    if F.CU_Q:
        if start_m >= seq.q_len:
            return
    k = at(k, b, hk, seq.k_start)
    v = at(v, b, hk, seq.k_start)
    q_tile = load_tile(at(q, b, h, seq.q_start), start_m, seq.q_len, BLOCK_M, F.QK, True)
    do = load_tile(at(grad_out, b, h, seq.q_start), start_m, seq.q_len, BLOCK_M, F.V, True)
    i = start_m + tl.arange(0, BLOCK_M)
    row_lse, row_delta = load_statistics(lse, delta, b, h, i, seq, sizes, F)
    rows = queries(b, h, i[:, None], seq, x, sizes, F)
    k_described, v_described = None, None
    if DESCRIPTORS:
        k_described = describe(k, seq.k_len, BLOCK_N, F.QK)
        v_described = describe(v, seq.k_len, BLOCK_N, F.V)
    last = tl.minimum(start_m + BLOCK_M, seq.q_len) - 1
    gap, begin, full_begin, full_end, end = key_tiles(start_m, last, b, h, seq, x, sizes, BLOCK_M, BLOCK_N, F)
    acc = zeros(BLOCK_M, F.QK)
    if CAREFUL:
        acc = _dq_keys(
            acc, begin, end, gap, q_tile, do, row_lse, row_delta, k, v, k_described, v_described, rows, b,
            seq, x, sizes, scales, F, BLOCK_N, True, True, False,
        )  # fmt: skip
    else:
        if F.EDGE_FIRST:
            acc = _dq_keys(
                acc, begin, tl.minimum(full_begin, end), gap, q_tile, do, row_lse, row_delta, k, v,
                k_described, v_described, rows, b, seq, x, sizes, scales, F, BLOCK_N, True, False, DESCRIPTORS,
            )  # fmt: skip
        acc = _dq_keys(
            acc, full_begin, full_end, 0, q_tile, do, row_lse, row_delta, k, v,
            k_described, v_described, rows, b, seq, x, sizes, scales, F, BLOCK_N, False, False, DESCRIPTORS,
        )  # fmt: skip
        acc = _dq_keys(
            acc, full_end, end, 0, q_tile, do, row_lse, row_delta, k, v,
            k_described, v_described, rows, b, seq, x, sizes, scales, F, BLOCK_N, True, False, DESCRIPTORS,
        )  # fmt: skip
    exists = i < seq.q_len
    if F.RESTRICTED and not CAREFUL:
        tl.store(broken, has_nonfinite(acc, exists, F.QK).to(tl.uint8))
    dq = at(dq, b, h, seq.q_start)
    store_rows(dq, dq.data + i.to(tl.int64) * dq.stride[2], times(acc, scales.softmax, F.QK), exists, F.QK)
