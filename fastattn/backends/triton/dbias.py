"""The gradient of a bias, summed over what the bias was broadcast to."""

import triton
import triton.language as tl

from fastattn.backends.triton.backward import gradient, load_statistics
from fastattn.backends.triton.scores import kept, queries
from fastattn.backends.triton.sequences import SIZES, Extras, Sizes, key_tiles, sequence
from fastattn.backends.triton.tiles import Pages, at, load_keys, load_tile, matmul


@triton.jit(do_not_specialize=["lse", "delta", "bias_b", "bias_h", "bias_m", "bias_n", *SIZES])
def dbias_kernel(
    q, k, v, mask, bias, x, grad_out, lse, delta,
    dbias,  # Matrix in the bias's own shape
    bias_b, bias_h, bias_m, bias_n,  # the bias's own shape
    batch, heads_q, group, seqlen_q, seqlen_k, rows_q, lo, hi, offset, page_size, splits, threshold,
    slopes_step, q_segments_step, k_segments_step, pages_step,
    scales,
    SUM_M: tl.constexpr, SUM_N: tl.constexpr,  # whether the bias is broadcast over queries, over keys
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per tile of the bias, looping over the batch entries, heads, queries and keys it is broadcast to."""
    sizes = Sizes(
        batch, heads_q, group, seqlen_q, seqlen_k, rows_q, lo, hi, offset, page_size, splits, threshold,
        slopes_step, q_segments_step, k_segments_step, pages_step,
    )  # fmt: skip
    x = Extras(mask, bias, *x)
    tiles_m = tl.cdiv(bias_m, BLOCK_M)
    tiles_n = tl.cdiv(bias_n, BLOCK_N)
    pid = tl.program_id(0)
    own_n = pid % tiles_n * BLOCK_N
    own_m = pid // tiles_n % tiles_m * BLOCK_M
    own_h = pid // (tiles_n * tiles_m) % bias_h
    own_b = pid // (tiles_n * tiles_m) // bias_h
    first_b, last_b = own_b, own_b + 1
    first_h, last_h = own_h, own_h + 1
    if bias_b == 1:
        last_b = batch
    if bias_h == 1:
        last_h = heads_q
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pages = Pages(None, 0)
    for b in tl.range(first_b, last_b):
        seq = sequence(b, x, sizes, F)
        first_m, last_m = own_m, tl.minimum(own_m + BLOCK_M, seq.q_len)
        if SUM_M:
            first_m, last_m = own_m * 0, seq.q_len
        for h in tl.range(first_h, last_h):
            k_head = at(k, b, h // sizes.group, seq.k_start)
            v_head = at(v, b, h // sizes.group, seq.k_start)
            for start_m in tl.range(first_m, last_m, BLOCK_M):
                last = tl.minimum(start_m + BLOCK_M, seq.q_len) - 1
                seen = key_tiles(start_m, last, b, h, seq, x, sizes, BLOCK_M, BLOCK_N, F)
                begin, end = seen.begin, seen.end
                if F.PREFIX and F.HAS_LO:
                    begin = begin * 0
                if not SUM_N:
                    begin, end = tl.maximum(begin, own_n), tl.minimum(end, own_n + BLOCK_N)
                q_tile = load_tile(at(q, b, h, seq.q_start), start_m, seq.q_len, BLOCK_M, F.QK, True)
                do = load_tile(at(grad_out, b, h, seq.q_start), start_m, seq.q_len, BLOCK_M, F.V, True)
                i = start_m + tl.arange(0, BLOCK_M)
                row_lse, row_delta = load_statistics(lse, delta, b, h, i, seq, sizes, F)
                rows = queries(b, h, i[:, None], seq, x, sizes, F)
                for start_n in tl.range(begin, end, BLOCK_N):
                    k_tile = load_keys(
                        k_head, None, pages, start_n, seq.k_first, seq.k_len, BLOCK_N, F.QK, F, True, False
                    )
                    v_tile = load_keys(
                        v_head, None, pages, start_n, seq.k_first, seq.k_len, BLOCK_N, F.V, F, True, False
                    )
                    qk = matmul(q_tile, k_tile, F.QK, F)
                    dp = matmul(do, v_tile, F.V, F)
                    keep = None
                    if F.DROPOUT:
                        keep = kept(rows.i, rows.head, start_n, x.seed, sizes.threshold, BLOCK_N)
                    j = (start_n + tl.arange(0, BLOCK_N))[None, :]
                    tile = gradient(
                        qk, dp, row_lse[:, None], row_delta[:, None], keep, rows, j, b, seq, x, sizes, scales, F, True
                    )
                    acc += tl.where(i[:, None] < seq.q_len, tile[1], 0.0)
    row = own_m + tl.arange(0, BLOCK_M)[:, None]
    col = own_n + tl.arange(0, BLOCK_N)[None, :]
    if SUM_M:
        acc = tl.sum(acc, 0)[None, :]
        row = own_m + tl.arange(0, 1)[:, None]
    if SUM_N:
        acc = tl.sum(acc, 1)[:, None]
        col = own_n + tl.arange(0, 1)[None, :]
    dbias = at(dbias, own_b, own_h, 0)
    pointers = dbias.data + row.to(tl.int64) * dbias.stride[2] + col.to(tl.int64) * dbias.stride[3]
    tl.store(pointers, acc.to(dbias.data.dtype.element_ty), mask=(row < bias_m) & (col < bias_n))
