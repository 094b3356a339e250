"""What every kernel shares: tile loads, tile ranges of a window, scores, dropout, and sums that stay clean of NaN.

Conventions of all kernels:

- One program per tile on a one-dimensional grid; every program owns what it writes, so nothing is atomic and every
  result is bitwise reproducible.
- ``sizes = (heads_q, group_size, seqlen_q, seqlen_k, lo, hi)``; key j is inside the window iff lo <= j - i <= hi.
- ``x_stride`` has four elements; offsets are 64-bit.
- Scores are in base-2 units (multiplied by log2(e)) unless there is a bias: finfo.min * log2(e) is -inf.
- ``F`` is a :class:`~fastattn.backends.triton.configs.Features`; a feature that is off costs nothing.
- ``EDGE`` loops see tiles that reach over a sequence's end or the window's edge; the others do not look at indices.
- Where some key is invisible to some query, 0 * NaN or 0 * inf may enter a sum that must not see it. The kernels look
  at their sums once, at the end, and mark the tiles that are not finite in ``broken``; a second launch, with CAREFUL,
  does the marked tiles again by :func:`careful_product`. Apart from the launch that costs nothing.
"""

import triton
import triton.language as tl

from fastattn.backends.triton.configs import INTERPRET

INTERPRETED = tl.constexpr(INTERPRET)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def load_tile(x, start, count, stride, BLOCK: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr, EDGE):
    """Rows [start, start + BLOCK) of a matrix with COLS columns: (BLOCK, BLOCK_COLS), zero outside.

    ``stride`` is (.., .., row, column). Without EDGE the rows are known to exist.
    """
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    # One 64-bit product for the tile, the rest does not change from tile to tile.
    pointers = x + tl.cast(start, tl.int64) * stride[2] + row.to(tl.int64) * stride[2] + col.to(tl.int64) * stride[3]
    if EDGE:
        return tl.load(pointers, mask=(row < count - start) & (col < COLS), other=0.0)
    elif COLS != BLOCK_COLS:
        return tl.load(pointers, mask=col < COLS, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(x, value, start, count, stride, BLOCK: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Writes what of a (BLOCK, BLOCK_COLS) tile lies inside the matrix, in the matrix's type."""
    row = tl.arange(0, BLOCK)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    pointers = x + tl.cast(start, tl.int64) * stride[2] + row.to(tl.int64) * stride[2] + col.to(tl.int64) * stride[3]
    tl.store(pointers, value.to(x.dtype.element_ty), mask=(row < count - start) & (col < COLS))


@triton.jit
def window_tiles(
    start, size, count, other_count, lo, hi,
    BLOCK: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Which of the others (keys, or queries) the rows [start, start + size) see: begin, full_begin, full_end, end.

    A row i sees [i + lo, i + hi] of [0, other_count). Some row sees something in [begin, end) only, and in
    [full_begin, full_end) every row sees everything. begin and full_* are multiples of BLOCK. WHOLE: a tile of rows
    that reaches over their end is not full anywhere.
    """
    last = tl.minimum(start + size, count) - 1
    begin = start * 0
    full_begin = begin
    end = begin + other_count
    full_end = end
    if HAS_LO:
        begin = tl.maximum(start + lo, 0) // BLOCK * BLOCK
        full_begin = (tl.maximum(last + lo, 0) + BLOCK - 1) // BLOCK * BLOCK
    if HAS_HI:
        end = tl.minimum(end, tl.maximum(last + hi + 1, 0))
        full_end = tl.minimum(end, tl.maximum(start + hi + 1, 0))
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    if WHOLE:
        full_end = tl.where(start + size > count, full_begin, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def _load_scores(x, i, j, sizes, stride, inside, KIND: tl.constexpr, EDGE: tl.constexpr):
    """A tile of a mask or bias; without EDGE, and so without predicates, the loads are wide."""
    if KIND == "key":
        return tl.load(x + j.to(tl.int64) * stride[3], mask=j < sizes[3], other=0)
    elif EDGE:
        return tl.load(x + i.to(tl.int64) * stride[2] + j.to(tl.int64) * stride[3], mask=inside, other=0)
    else:
        return tl.load(x + i.to(tl.int64) * stride[2] + j.to(tl.int64) * stride[3])


@triton.jit
def scores(qk, i, j, sizes, scale, mask, mask_stride, bias, bias_stride, F: tl.constexpr, EDGE: tl.constexpr):
    """Scores (anything where invisible) and visibility, in the orientation of ``qk``.

    ``i`` and ``j`` are query and key indices that broadcast to the tile; ``mask`` and ``bias`` point at their matrix
    of this batch entry and head. Without EDGE, mask and bias everything that exists is visible.
    """
    s = qk * scale
    visible = (i < sizes[2]) & (j < sizes[3])
    inside = visible
    if EDGE:
        if F.HAS_LO:
            visible &= j - i >= sizes[4]
        if F.HAS_HI:
            visible &= j - i <= sizes[5]
    if F.MASK != "none":
        visible &= _load_scores(mask, i, j, sizes, mask_stride, inside, F.MASK, EDGE) != 0
    if F.BIAS != "none":
        b = _load_scores(bias, i, j, sizes, bias_stride, inside, F.BIAS, EDGE).to(tl.float32)
        s += b
        visible &= b != -INF
    return s, visible


@triton.jit
def exponential(x, F: tl.constexpr):
    """exp of a difference of scores."""
    if F.BIAS != "none":
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def kept(seed, threshold, bh, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which entries of a (BLOCK_M, BLOCK_N) tile survive dropout; start_n is a multiple of 4.

    Philox4x32-10 with key ``seed`` and counter (j // 4, i, bh, 0); word j % 4 belongs to key j.
    """
    i = (start_m + tl.arange(0, BLOCK_M)).to(tl.uint32)[:, None]
    quad = (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.uint32)
    bh = tl.cast(bh, tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), zero + quad, zero + i, zero + bh, zero)
    limit = tl.cast(threshold, tl.uint32, bitcast=True)
    w0 = (w0 >= limit).to(tl.int8)
    w1 = (w1 >= limit).to(tl.int8)
    w2 = (w2 >= limit).to(tl.int8)
    w3 = (w3 >= limit).to(tl.int8)
    # join adds a last dimension: [.., a, b] holds word 2a + b.
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def matmul(a, b, F: tl.constexpr):
    """a @ b in float32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16; a product of float32 copies is exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=F.PRECISION)


@triton.jit
def product(weights, x, acc, F: tl.constexpr):
    """acc + weights @ x, with the weights (float32) rounded to the type of x."""
    weights = weights.to(x.dtype)
    if INTERPRETED:
        weights = weights.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(weights, x, acc, input_precision=F.PRECISION)


@triton.jit
def careful_product(
    weights, visible, x, start, count, stride, acc, BLOCK: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """acc + weights @ x[start : start + BLOCK], where a row of x reaches only the rows of acc that see it.

    One row of x after the other, which needs no registers beyond acc. 0 * NaN of an invisible entry is not formed.
    """
    index = tl.arange(0, BLOCK)[None, :]
    col = tl.arange(0, BLOCK_COLS)
    for n in tl.range(0, tl.minimum(BLOCK, count - start)):
        pointers = x + tl.cast(start + n, tl.int64) * stride[2] + col.to(tl.int64) * stride[3]
        row = tl.load(pointers, mask=col < COLS, other=0.0)
        weight = tl.sum(tl.where(index == n, weights, 0.0), 1)
        seen = tl.max(tl.where((index == n) & visible, 1, 0), 1)
        acc += tl.where(seen[:, None] != 0, weight[:, None] * row.to(tl.float32)[None, :], 0.0)
    return acc


@triton.jit
def has_nonfinite(acc, start, count, BLOCK: tl.constexpr):
    """Whether a row of the tile that exists holds NaN or inf."""
    exists = (start + tl.arange(0, BLOCK) < count)[:, None]
    broken = tl.where(exists & ((acc != acc) | (tl.abs(acc) == INF)), 1, 0)
    return tl.max(tl.max(broken, 1), 0) != 0
