"""The forward kernel: one program per tile of queries, an online softmax over the tiles of keys it sees."""

import triton
import triton.language as tl

from fastattn.backends.triton.common import (
    INF,
    LN2,
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


@triton.jit
def _attend(
    state,
    first,
    last,
    q,
    k,
    v,
    k_stride,
    v_stride,
    mask,
    mask_stride,
    bias,
    bias_stride,
    dropout,
    bh,
    start_m,
    sizes,
    scale,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Takes the keys [first, last) into ``state``: acc (BLOCK_M, BLOCK_DV), sum (BLOCK_M), maximum (BLOCK_M)."""
    acc, total, maximum = state
    i = (start_m + tl.arange(0, BLOCK_M))[:, None]
    for start_n in tl.range(first, last, BLOCK_N):
        k_tile = load_tile(k, start_n, sizes[3], k_stride, BLOCK_N, F.HEAD_DIM_QK, F.BLOCK_DQK, EDGE)
        qk = matmul(q, tl.trans(k_tile), F)
        j = (start_n + tl.arange(0, BLOCK_N))[None, :]
        s, visible = scores(qk, i, j, sizes, scale, mask, mask_stride, bias, bias_stride, F, EDGE)
        if EDGE or F.MASK != "none" or F.BIAS != "none":
            s = tl.where(visible, s, -INF)
            new_maximum = tl.maximum(maximum, tl.max(s, 1))
            # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
            pivot = tl.where(new_maximum == -INF, 0.0, new_maximum)
            p = exponential(s - pivot[:, None], F)
        else:
            # scale >= 0 (the sign is in q), so the maximum scales; scale and pivot go into one multiply-add.
            new_maximum = tl.maximum(maximum, tl.max(qk, 1) * scale)
            pivot = new_maximum
            p = tl.exp2(qk * scale - pivot[:, None])
        shrink = exponential(maximum - pivot, F)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if F.DROPOUT:
            p = tl.where(kept(dropout[0], dropout[1], bh, start_m, start_n, BLOCK_M, BLOCK_N), p, 0.0)
        if CAREFUL:
            acc = careful_product(p, visible, v, start_n, sizes[3], v_stride, acc, BLOCK_N, F.HEAD_DIM_V, F.BLOCK_DV)
        else:
            v_tile = load_tile(v, start_n, sizes[3], v_stride, BLOCK_N, F.HEAD_DIM_V, F.BLOCK_DV, EDGE)
            acc = product(p, v_tile, acc, F)
        maximum = new_maximum
    return acc, total, maximum


@triton.jit(do_not_specialize=["sizes", "threshold"])
def forward_kernel(
    q,  # (batch, heads_q, seqlen_q, head_dim_qk)
    k,  # (batch, heads_k, seqlen_k, head_dim_qk)
    v,  # (batch, heads_k, seqlen_k, head_dim_v)
    mask,  # (batch, heads_q, seqlen_q, seqlen_k) uint8, nonzero = visible, or None
    bias,  # (batch, heads_q, seqlen_q, seqlen_k), or None
    out,  # (batch, heads_q, seqlen_q, head_dim_v)
    lse,  # (batch, heads_q, seqlen_q) float32, contiguous
    seed,  # one int64, or None
    broken,  # (batch, heads_q, tiles of FLAG_BLOCK queries) uint8: the tile holds NaN or inf; None if not RESTRICTED
    q_stride,
    k_stride,
    v_stride,
    mask_stride,
    bias_stride,
    out_stride,
    sizes,
    scale,  # of scores: softmax_scale, times log2(e) without a bias
    threshold,  # int32 bits of the uint32 below which a random word drops its entry
    dropout_scale,  # 1 / (1 - dropout_p)
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAG_BLOCK: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Without CAREFUL every tile, marking the broken ones; with it, the broken ones again."""
    tiles = tl.cdiv(sizes[2], BLOCK_M)
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    if F.HAS_HI:
        tile = tiles - 1 - tile  # later queries see more keys: longest first
    start_m = tile * BLOCK_M
    if F.RESTRICTED:
        broken += bh.to(tl.int64) * tl.cdiv(sizes[2], FLAG_BLOCK) + start_m // FLAG_BLOCK
        if CAREFUL:
            if tl.load(broken) == 0:
                return
    b = (bh // sizes[0]).to(tl.int64)
    h = (bh % sizes[0]).to(tl.int64)
    hk = h // sizes[1]
    k += b * k_stride[0] + hk * k_stride[1]
    v += b * v_stride[0] + hk * v_stride[1]
    if F.MASK != "none":
        mask += b * mask_stride[0] + h * mask_stride[1]
    if F.BIAS != "none":
        bias += b * bias_stride[0] + h * bias_stride[1]

    q += b * q_stride[0] + h * q_stride[1]
    q_tile = load_tile(q, start_m, sizes[2], q_stride, BLOCK_M, F.HEAD_DIM_QK, F.BLOCK_DQK, True)
    if F.NEGATE:
        q_tile = (-q_tile.to(tl.float32)).to(q_tile.dtype)
    dropout = (seed, threshold)
    begin, full_begin, full_end, end = window_tiles(
        start_m, BLOCK_M, sizes[2], sizes[3], sizes[4], sizes[5], BLOCK_N, F.HAS_LO, F.HAS_HI, F.WHOLE
    )
    state = (
        tl.zeros((BLOCK_M, F.BLOCK_DV), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.full((BLOCK_M,), -INF, tl.float32),
    )
    if CAREFUL:
        state = _attend(
            state, begin, end, q_tile, k, v, k_stride, v_stride, mask, mask_stride,
            bias, bias_stride, dropout, bh, start_m, sizes, scale, F, BLOCK_M, BLOCK_N, True, True,
        )  # fmt: skip
    else:
        if F.HAS_LO:
            state = _attend(
                state, begin, tl.minimum(full_begin, end), q_tile, k, v, k_stride, v_stride, mask, mask_stride,
                bias, bias_stride, dropout, bh, start_m, sizes, scale, F, BLOCK_M, BLOCK_N, True, False,
            )  # fmt: skip
        state = _attend(
            state, full_begin, full_end, q_tile, k, v, k_stride, v_stride, mask, mask_stride,
            bias, bias_stride, dropout, bh, start_m, sizes, scale, F, BLOCK_M, BLOCK_N, False, False,
        )  # fmt: skip
        state = _attend(
            state, full_end, end, q_tile, k, v, k_stride, v_stride, mask, mask_stride,
            bias, bias_stride, dropout, bh, start_m, sizes, scale, F, BLOCK_M, BLOCK_N, True, False,
        )  # fmt: skip
    acc, total, maximum = state
    if F.RESTRICTED and not CAREFUL:
        tl.store(broken, has_nonfinite(acc, start_m, sizes[2], BLOCK_M).to(tl.uint8))

    weight = 1.0 / tl.where(total == 0.0, 1.0, total)
    if F.DROPOUT:
        weight *= dropout_scale
    out += b * out_stride[0] + h * out_stride[1]
    store_tile(out, acc * weight[:, None], start_m, sizes[2], out_stride, BLOCK_M, F.HEAD_DIM_V, F.BLOCK_DV)
    if F.BIAS != "none":
        log_sum = maximum + tl.log2(total) * LN2
    else:
        log_sum = (maximum + tl.log2(total)) * LN2
    i = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse + bh.to(tl.int64) * sizes[2] + i, tl.where(total == 0.0, -INF, log_sum), mask=i < sizes[2])
