"""The backward kernels. With P the probabilities, M = keep / (1 - dropout_p) (1 without dropout), scale the softmax's:

    dP = M * (dO V^T)     dS = P * (dP - delta), 0 where invisible     delta = rowsum(dO * O) - dlse
    dV = (M * P)^T dO     dQ = scale dS K     dK = scale dS^T Q     dbias = dS, summed over what was broadcast

Every output tile has one program that recomputes the P it needs from lse, so each pass is deterministic.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.common import (
    INF,
    LOG2E,
    careful_product,
    exponential,
    has_nonfinite,
    kept,
    load_tile,
    matmul,
    product,
    scores,
    store_tile,
    window_tiles,
)


@triton.jit(do_not_specialize=["sizes"])
def delta_kernel(
    out,  # (batch, heads_q, seqlen_q, head_dim_v)
    grad_out,  # like out
    grad_lse,  # (batch, heads_q, seqlen_q), or None
    delta,  # (batch, heads_q, seqlen_q) float32, contiguous
    out_stride,
    grad_out_stride,
    grad_lse_stride,
    sizes,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(dO * O) - dlse."""
    tiles = tl.cdiv(sizes[2], BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b = bh // sizes[0]
    h = bh % sizes[0]
    out += b * out_stride[0] + h * out_stride[1]
    grad_out += b * grad_out_stride[0] + h * grad_out_stride[1]
    o = load_tile(out, start_m, sizes[2], out_stride, BLOCK_M, F.HEAD_DIM_V, F.BLOCK_DV, True)
    do = load_tile(grad_out, start_m, sizes[2], grad_out_stride, BLOCK_M, F.HEAD_DIM_V, F.BLOCK_DV, True)
    value = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    i = start_m + tl.arange(0, BLOCK_M)
    if grad_lse is not None:
        pointers = grad_lse + b * grad_lse_stride[0] + h * grad_lse_stride[1] + i.to(tl.int64) * grad_lse_stride[2]
        value -= tl.load(pointers, mask=i < sizes[2], other=0.0).to(tl.float32)
    tl.store(delta + bh * sizes[2] + i, value, mask=i < sizes[2])


@triton.jit
def _load_rows(lse, delta, i, sizes, F: tl.constexpr):
    """lse, in units of the scores, and delta of the queries ``i``. lse is +inf where a row sees nothing: P = 0."""
    row_lse = tl.load(lse + i, mask=i < sizes[2], other=-INF)
    row_delta = tl.load(delta + i, mask=i < sizes[2], other=0.0)
    row_lse = tl.where(row_lse == -INF, INF, row_lse)
    if F.BIAS == "none":
        row_lse *= LOG2E
    return row_lse, row_delta


@triton.jit
def _probabilities_and_gradient(
    qk, dp, row_lse, row_delta, keep, i, j, sizes, scale, dropout_scale, mask, mask_stride, bias, bias_stride,
    F: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """M * P, dS and visibility of one tile, in the orientation of ``qk``; ``row_lse`` and ``row_delta`` broadcast."""
    s, visible = scores(qk, i, j, sizes, scale, mask, mask_stride, bias, bias_stride, F, EDGE)
    p = exponential(s - row_lse, F)
    if EDGE or F.MASK != "none" or F.BIAS != "none":
        p = tl.where(visible, p, 0.0)
    weights = p
    if F.DROPOUT:
        weights = tl.where(keep, p * dropout_scale, 0.0)
        dp = tl.where(keep, dp * dropout_scale, 0.0)
    ds = p * (dp - row_delta)
    if EDGE or F.MASK != "none" or F.BIAS != "none":
        # The value of an invisible key may be NaN.
        ds = tl.where(visible, ds, 0.0)
    return weights, ds, visible


@triton.jit
def _dkdv_queries(
    dk, dv, first, last, k_tile, v_tile, q, mask, bias, grad_out, lse, delta, dropout, b, hk, start_n,
    q_stride, mask_stride, bias_stride, grad_out_stride, sizes, scales,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Adds to dk, dv (BLOCK_N, D) what the queries [first, last) of the heads that share the key head contribute.

    Tiles are (keys, queries). The loop is over heads and tiles of queries at once: one pipeline, fewer registers.
    """
    j = (start_n + tl.arange(0, BLOCK_N))[:, None]
    tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    for t in tl.range(0, tiles * sizes[1]):
        h = hk * sizes[1] + t // tiles
        start_m = first + t % tiles * BLOCK_M
        bh = b * sizes[0] + h
        q_head = q + b * q_stride[0] + h * q_stride[1]
        grad_out_head = grad_out + b * grad_out_stride[0] + h * grad_out_stride[1]
        mask_head = mask
        bias_head = bias
        if F.MASK != "none":
            mask_head = mask + b * mask_stride[0] + h * mask_stride[1]
        if F.BIAS != "none":
            bias_head = bias + b * bias_stride[0] + h * bias_stride[1]
        q_tile = load_tile(q_head, start_m, sizes[2], q_stride, BLOCK_M, F.HEAD_DIM_QK, F.BLOCK_DQK, EDGE)
        do = load_tile(grad_out_head, start_m, sizes[2], grad_out_stride, BLOCK_M, F.HEAD_DIM_V, F.BLOCK_DV, EDGE)
        i = start_m + tl.arange(0, BLOCK_M)
        row_lse, row_delta = _load_rows(lse + bh * sizes[2], delta + bh * sizes[2], i, sizes, F)
        kq = matmul(k_tile, tl.trans(q_tile), F)
        dp = matmul(v_tile, tl.trans(do), F)
        keep = None
        if F.DROPOUT:
            keep = tl.trans(kept(dropout[0], dropout[1], bh, start_m, start_n, BLOCK_M, BLOCK_N))
        weights, ds, visible = _probabilities_and_gradient(
            kq, dp, row_lse[None, :], row_delta[None, :], keep, i[None, :], j, sizes, scales[0], scales[2],
            mask_head, mask_stride, bias_head, bias_stride, F, EDGE,
        )  # fmt: skip
        if CAREFUL:
            dv = careful_product(
                weights, visible, grad_out_head, start_m, sizes[2], grad_out_stride, dv,
                BLOCK_M, F.HEAD_DIM_V, F.BLOCK_DV,
            )  # fmt: skip
            dk = careful_product(
                ds, visible, q_head, start_m, sizes[2], q_stride, dk, BLOCK_M, F.HEAD_DIM_QK, F.BLOCK_DQK
            )
        else:
            dv = product(weights, do, dv, F)
            dk = product(ds, q_tile, dk, F)
    return dk, dv


@triton.jit(do_not_specialize=["sizes", "threshold"])
def dkdv_kernel(
    q, k, v, mask, bias, grad_out, lse, delta, dk, dv, seed, broken,
    q_stride, k_stride, v_stride, mask_stride, bias_stride, grad_out_stride, dk_stride, dv_stride,
    sizes, scales, threshold,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAG_BLOCK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys of one key head. ``scales``: of scores, of softmax, of dropout."""
    tiles = tl.cdiv(sizes[3], BLOCK_N)
    start_n = tl.program_id(0) % tiles * BLOCK_N
    heads_k = sizes[0] // sizes[1]
    bhk = (tl.program_id(0) // tiles).to(tl.int64)
    if F.RESTRICTED:
        broken += bhk * tl.cdiv(sizes[3], FLAG_BLOCK) + start_n // FLAG_BLOCK
        if CAREFUL:
            if tl.load(broken) == 0:
                return
    b = bhk // heads_k
    hk = bhk % heads_k
    k += b * k_stride[0] + hk * k_stride[1]
    v += b * v_stride[0] + hk * v_stride[1]
    k_tile = load_tile(k, start_n, sizes[3], k_stride, BLOCK_N, F.HEAD_DIM_QK, F.BLOCK_DQK, True)
    v_tile = load_tile(v, start_n, sizes[3], v_stride, BLOCK_N, F.HEAD_DIM_V, F.BLOCK_DV, True)
    dropout = (seed, threshold)
    # The window seen from the keys: j sees the queries [j - hi, j - lo].
    begin, full_begin, full_end, end = window_tiles(
        start_n, BLOCK_N, sizes[3], sizes[2], -sizes[5], -sizes[4], BLOCK_M, F.HAS_HI, F.HAS_LO, F.WHOLE
    )
    dk_acc = tl.zeros((BLOCK_N, F.BLOCK_DQK), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, F.BLOCK_DV), tl.float32)
    if CAREFUL:
        dk_acc, dv_acc = _dkdv_queries(
            dk_acc, dv_acc, begin, end, k_tile, v_tile, q, mask, bias, grad_out, lse, delta,
            dropout, b, hk, start_n, q_stride, mask_stride, bias_stride, grad_out_stride, sizes, scales,
            F, BLOCK_M, BLOCK_N, True, True,
        )  # fmt: skip
    else:
        if F.HAS_HI:
            dk_acc, dv_acc = _dkdv_queries(
                dk_acc, dv_acc, begin, tl.minimum(full_begin, end), k_tile, v_tile, q, mask, bias, grad_out, lse, delta,
                dropout, b, hk, start_n, q_stride, mask_stride, bias_stride, grad_out_stride, sizes, scales,
                F, BLOCK_M, BLOCK_N, True, False,
            )  # fmt: skip
        dk_acc, dv_acc = _dkdv_queries(
            dk_acc, dv_acc, full_begin, full_end, k_tile, v_tile, q, mask, bias, grad_out, lse, delta,
            dropout, b, hk, start_n, q_stride, mask_stride, bias_stride, grad_out_stride, sizes, scales,
            F, BLOCK_M, BLOCK_N, False, False,
        )  # fmt: skip
        dk_acc, dv_acc = _dkdv_queries(
            dk_acc, dv_acc, full_end, end, k_tile, v_tile, q, mask, bias, grad_out, lse, delta,
            dropout, b, hk, start_n, q_stride, mask_stride, bias_stride, grad_out_stride, sizes, scales,
            F, BLOCK_M, BLOCK_N, True, False,
        )  # fmt: skip
    if F.RESTRICTED and not CAREFUL:
        dk_broken = has_nonfinite(dk_acc, start_n, sizes[3], BLOCK_N)
        dv_broken = has_nonfinite(dv_acc, start_n, sizes[3], BLOCK_N)
        tl.store(broken, (dk_broken | dv_broken).to(tl.uint8))
    dk += b * dk_stride[0] + hk * dk_stride[1]
    dv += b * dv_stride[0] + hk * dv_stride[1]
    store_tile(dk, dk_acc * scales[1], start_n, sizes[3], dk_stride, BLOCK_N, F.HEAD_DIM_QK, F.BLOCK_DQK)
    store_tile(dv, dv_acc, start_n, sizes[3], dv_stride, BLOCK_N, F.HEAD_DIM_V, F.BLOCK_DV)


@triton.jit
def _dq_keys(
    dq, first, last, q_tile, do, row_lse, row_delta, k, v, k_stride, v_stride, mask, mask_stride, bias, bias_stride,
    dropout, bh, start_m, sizes, scales,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Adds to dq (BLOCK_M, BLOCK_DQK) what the keys [first, last) contribute."""
    i = (start_m + tl.arange(0, BLOCK_M))[:, None]
    for start_n in tl.range(first, last, BLOCK_N):
        k_tile = load_tile(k, start_n, sizes[3], k_stride, BLOCK_N, F.HEAD_DIM_QK, F.BLOCK_DQK, EDGE)
        v_tile = load_tile(v, start_n, sizes[3], v_stride, BLOCK_N, F.HEAD_DIM_V, F.BLOCK_DV, EDGE)
        qk = matmul(q_tile, tl.trans(k_tile), F)
        dp = matmul(do, tl.trans(v_tile), F)
        keep = None
        if F.DROPOUT:
            keep = kept(dropout[0], dropout[1], bh, start_m, start_n, BLOCK_M, BLOCK_N)
        j = (start_n + tl.arange(0, BLOCK_N))[None, :]
        _, ds, visible = _probabilities_and_gradient(
            qk, dp, row_lse[:, None], row_delta[:, None], keep, i, j, sizes, scales[0], scales[2],
            mask, mask_stride, bias, bias_stride, F, EDGE,
        )  # fmt: skip
        if CAREFUL:
            dq = careful_product(ds, visible, k, start_n, sizes[3], k_stride, dq, BLOCK_N, F.HEAD_DIM_QK, F.BLOCK_DQK)
        else:
            dq = product(ds, k_tile, dq, F)
    return dq


@triton.jit(do_not_specialize=["sizes", "threshold"])
def dq_kernel(
    q, k, v, mask, bias, grad_out, lse, delta, dq, seed, broken,
    q_stride, k_stride, v_stride, mask_stride, bias_stride, grad_out_stride, dq_stride,
    sizes, scales, threshold,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAG_BLOCK: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries."""
    tiles = tl.cdiv(sizes[2], BLOCK_M)
    tile = tl.program_id(0) % tiles
    if F.HAS_HI:
        tile = tiles - 1 - tile  # longest first
    start_m = tile * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    if F.RESTRICTED:
        broken += bh * tl.cdiv(sizes[2], FLAG_BLOCK) + start_m // FLAG_BLOCK
        if CAREFUL:
            if tl.load(broken) == 0:
                return
    b = bh // sizes[0]
    h = bh % sizes[0]
    hk = h // sizes[1]
    q += b * q_stride[0] + h * q_stride[1]
    k += b * k_stride[0] + hk * k_stride[1]
    v += b * v_stride[0] + hk * v_stride[1]
    grad_out += b * grad_out_stride[0] + h * grad_out_stride[1]
    if F.MASK != "none":
        mask += b * mask_stride[0] + h * mask_stride[1]
    if F.BIAS != "none":
        bias += b * bias_stride[0] + h * bias_stride[1]
    q_tile = load_tile(q, start_m, sizes[2], q_stride, BLOCK_M, F.HEAD_DIM_QK, F.BLOCK_DQK, True)
    do = load_tile(grad_out, start_m, sizes[2], grad_out_stride, BLOCK_M, F.HEAD_DIM_V, F.BLOCK_DV, True)
    i = start_m + tl.arange(0, BLOCK_M)
    row_lse, row_delta = _load_rows(lse + bh * sizes[2], delta + bh * sizes[2], i, sizes, F)
    dropout = (seed, threshold)
    begin, full_begin, full_end, end = window_tiles(
        start_m, BLOCK_M, sizes[2], sizes[3], sizes[4], sizes[5], BLOCK_N, F.HAS_LO, F.HAS_HI, F.WHOLE
    )
    acc = tl.zeros((BLOCK_M, F.BLOCK_DQK), tl.float32)
    if CAREFUL:
        acc = _dq_keys(
            acc, begin, end, q_tile, do, row_lse, row_delta, k, v, k_stride, v_stride, mask,
            mask_stride, bias, bias_stride, dropout, bh, start_m, sizes, scales, F, BLOCK_M, BLOCK_N, True, True,
        )  # fmt: skip
    else:
        if F.HAS_LO:
            acc = _dq_keys(
                acc, begin, tl.minimum(full_begin, end), q_tile, do, row_lse, row_delta, k, v, k_stride, v_stride, mask,
                mask_stride, bias, bias_stride, dropout, bh, start_m, sizes, scales, F, BLOCK_M, BLOCK_N, True, False,
            )  # fmt: skip
        acc = _dq_keys(
            acc, full_begin, full_end, q_tile, do, row_lse, row_delta, k, v, k_stride, v_stride, mask,
            mask_stride, bias, bias_stride, dropout, bh, start_m, sizes, scales, F, BLOCK_M, BLOCK_N, False, False,
        )  # fmt: skip
        acc = _dq_keys(
            acc, full_end, end, q_tile, do, row_lse, row_delta, k, v, k_stride, v_stride, mask,
            mask_stride, bias, bias_stride, dropout, bh, start_m, sizes, scales, F, BLOCK_M, BLOCK_N, True, False,
        )  # fmt: skip
    if F.RESTRICTED and not CAREFUL:
        tl.store(broken, has_nonfinite(acc, start_m, sizes[2], BLOCK_M).to(tl.uint8))
    dq += b * dq_stride[0] + h * dq_stride[1]
    store_tile(dq, acc * scales[1], start_m, sizes[2], dq_stride, BLOCK_M, F.HEAD_DIM_QK, F.BLOCK_DQK)


@triton.jit(do_not_specialize=["sizes", "extent", "threshold"])
def dbias_kernel(
    q, k, v, mask, bias, grad_out, lse, delta, dbias, seed,
    q_stride, k_stride, v_stride, mask_stride, bias_stride, grad_out_stride, dbias_stride,
    sizes,
    extent,  # (batch, heads_q, bias.shape[0], bias.shape[1], bias.shape[2], bias.shape[3])
    scales, threshold,
    SUM_M: tl.constexpr, SUM_N: tl.constexpr,  # whether the bias is broadcast over queries, over keys
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per tile of the bias, looping over the batch entries, heads, queries and keys it is broadcast to."""
    tiles_m = tl.cdiv(extent[4], BLOCK_M)
    tiles_n = tl.cdiv(extent[5], BLOCK_N)
    pid = tl.program_id(0)
    own_n = pid % tiles_n * BLOCK_N
    own_m = pid // tiles_n % tiles_m * BLOCK_M
    own_h = pid // (tiles_n * tiles_m) % extent[3]
    own_b = pid // (tiles_n * tiles_m) // extent[3]
    first_b, last_b = own_b, own_b + 1
    first_h, last_h = own_h, own_h + 1
    if extent[2] == 1:
        last_b = extent[0]
    if extent[3] == 1:
        last_h = extent[1]
    first_m, last_m = own_m, tl.minimum(own_m + BLOCK_M, sizes[2])
    if SUM_M:
        first_m, last_m = own_m * 0, sizes[2]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b32 in tl.range(first_b, last_b):
        for h32 in tl.range(first_h, last_h):
            b = tl.cast(b32, tl.int64)
            h = tl.cast(h32, tl.int64)
            hk = h // sizes[1]
            bh = b * sizes[0] + h
            q_head = q + b * q_stride[0] + h * q_stride[1]
            grad_out_head = grad_out + b * grad_out_stride[0] + h * grad_out_stride[1]
            k_head = k + b * k_stride[0] + hk * k_stride[1]
            v_head = v + b * v_stride[0] + hk * v_stride[1]
            mask_head = mask
            if F.MASK != "none":
                mask_head = mask + b * mask_stride[0] + h * mask_stride[1]
            bias_head = bias + b * bias_stride[0] + h * bias_stride[1]
            for start_m in tl.range(first_m, last_m, BLOCK_M):
                begin, _full_begin, _full_end, end = window_tiles(
                    start_m, BLOCK_M, sizes[2], sizes[3], sizes[4], sizes[5], BLOCK_N, F.HAS_LO, F.HAS_HI, F.WHOLE
                )
                if not SUM_N:
                    begin, end = tl.maximum(begin, own_n), tl.minimum(end, own_n + BLOCK_N)
                q_tile = load_tile(q_head, start_m, sizes[2], q_stride, BLOCK_M, F.HEAD_DIM_QK, F.BLOCK_DQK, True)
                do = load_tile(
                    grad_out_head, start_m, sizes[2], grad_out_stride, BLOCK_M, F.HEAD_DIM_V, F.BLOCK_DV, True
                )
                i = start_m + tl.arange(0, BLOCK_M)
                row_lse, row_delta = _load_rows(lse + bh * sizes[2], delta + bh * sizes[2], i, sizes, F)
                for start_n in tl.range(begin, end, BLOCK_N):
                    k_tile = load_tile(k_head, start_n, sizes[3], k_stride, BLOCK_N, F.HEAD_DIM_QK, F.BLOCK_DQK, True)
                    v_tile = load_tile(v_head, start_n, sizes[3], v_stride, BLOCK_N, F.HEAD_DIM_V, F.BLOCK_DV, True)
                    qk = matmul(q_tile, tl.trans(k_tile), F)
                    dp = matmul(do, tl.trans(v_tile), F)
                    keep = None
                    if F.DROPOUT:
                        keep = kept(seed, threshold, bh, start_m, start_n, BLOCK_M, BLOCK_N)
                    j = (start_n + tl.arange(0, BLOCK_N))[None, :]
                    _weights, ds, _visible = _probabilities_and_gradient(
                        qk, dp, row_lse[:, None], row_delta[:, None], keep, i[:, None], j, sizes, scales[0], scales[2],
                        mask_head, mask_stride, bias_head, bias_stride, F, True,
                    )  # fmt: skip
                    acc += ds
    row = own_m + tl.arange(0, BLOCK_M)[:, None]
    col = own_n + tl.arange(0, BLOCK_N)[None, :]
    if SUM_M:
        acc = tl.sum(acc, 0)[None, :]
        row = own_m + tl.arange(0, 1)[:, None]
    if SUM_N:
        acc = tl.sum(acc, 1)[:, None]
        col = own_n + tl.arange(0, 1)[None, :]
    dbias += tl.cast(own_b, tl.int64) * dbias_stride[0] + tl.cast(own_h, tl.int64) * dbias_stride[1]
    pointers = dbias + row.to(tl.int64) * dbias_stride[2] + col.to(tl.int64) * dbias_stride[3]
    tl.store(pointers, acc.to(dbias.dtype.element_ty), mask=(row < extent[4]) & (col < extent[5]))
