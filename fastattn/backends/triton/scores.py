"""Scores of a tile, their shaping and visibility, and which of their weights dropout keeps.

Scores are in base-2 units (multiplied by log2(e)) unless there is a bias: finfo.min * log2(e) is -inf.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.tiles import INF

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Queries(NamedTuple):
    """The queries of a tile, in a column (BLOCK_M, 1) or a row (1, BLOCK_M); what is one for all may be a scalar."""

    i: Any
    head: Any  #: batch * heads_q + head, for dropout
    slope: Any  #: ALiBi's, in units of the scores
    segment: Any
    mask: Any  #: pointers to the queries' rows of the mask
    bias: Any


@triton.jit
def _score_rows(x, b, h, i, FULL: tl.constexpr):
    pointers = x.data + tl.cast(b, tl.int64) * x.stride[0] + tl.cast(h, tl.int64) * x.stride[1]
    if FULL:
        pointers += i.to(tl.int64) * x.stride[2]
    return pointers


@triton.jit
def queries(b, h, i, seq, x, sizes, F: tl.constexpr):
    """The queries ``i`` of heads ``h`` (both of one shape, or ``h`` a scalar) of batch entry ``b``."""
    slope, segment, mask, bias = 0, 0, 0, 0  # where a call has none: Triton 3.6 returns no None
    existing = tl.minimum(i, seq.q_len - 1)
    if F.ALIBI:
        slope = tl.load(x.slopes + tl.cast(b, tl.int64) * sizes.slopes_step + h)
        if F.BIAS == "none":
            slope *= LOG2E
    if F.SEGMENTS:
        segment = tl.load(x.q_segments + tl.cast(b, tl.int64) * sizes.q_segments_step + existing)
    if F.MASK != "none":
        mask = _score_rows(x.mask, b, h, existing, F.MASK == "full")
    if F.BIAS != "none":
        bias = _score_rows(x.bias, b, h, existing, F.BIAS == "full")
    return Queries(i, tl.cast(b, tl.int64) * sizes.heads_q + h, slope, segment, mask, bias)


@triton.jit
def _load_scores(rows, j, step, count, EDGE: tl.constexpr):
    """A tile of a mask or bias; without EDGE, and so without predicates, the loads are wide."""
    if EDGE:
        return tl.load(rows + j.to(tl.int64) * step, mask=j < count, other=0)
    else:
        return tl.load(rows + j.to(tl.int64) * step)


@triton.jit
def tanh(x):
    """tanh to 4 units in the last place: x + x^3 p(x^2) up to 0.625, then (1 - e^-2|x|) / (1 + e^-2|x|).

    p is fitted in the relative error of tanh by weighted least squares at Chebyshev nodes.
    """
    z = x * x
    p = -0.0057170502841
    p = p * z + 0.0206505935639
    p = p * z - 0.0537435002625
    p = p * z + 0.1333149075508
    p = p * z - 0.3333328366280
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0, -large, large))


@triton.jit
def scores(qk, rows, j, b, seq, x, sizes, scales, F: tl.constexpr, EDGE: tl.constexpr):
    """Scores (anything where invisible), visibility, and d score / d (scale q k^T), in the orientation of ``qk``.

    ``rows`` are the tile's :class:`Queries`, ``j`` its keys, running along the other dimension. Without EDGE all keys
    are visible that a full mask and the bias do not hide. Queries that do not exist are the caller's concern.
    """
    s = qk * scales.scores
    steepness = 1.0
    if F.SOFTCAP:
        t = tanh(s)
        s = t * scales.cap
        steepness = 1.0 - t * t
    if F.ALIBI:
        s -= rows.slope * tl.abs(rows.i + seq.offset - j).to(tl.float32)
    visible = j < seq.k_len
    if EDGE:
        if F.HAS_LO or F.HAS_HI:
            near = visible
            if F.HAS_LO:
                near &= j - rows.i >= seq.lo
            if F.HAS_HI:
                near &= j - rows.i <= seq.hi
            if F.PREFIX:
                near |= j < seq.prefix
            visible = near
        if F.LEFTPAD:
            visible &= j >= seq.k_first
        if F.SEGMENTS:
            segments = x.k_segments + tl.cast(b, tl.int64) * sizes.k_segments_step
            visible &= tl.load(segments + j, mask=j < seq.k_len, other=0) == rows.segment
    if F.MASK == "full" or (F.MASK == "key" and EDGE):
        visible &= _load_scores(rows.mask, j, x.mask.stride[3], seq.k_len, EDGE) != 0
    if F.BIAS != "none":
        bias = _load_scores(rows.bias, j, x.bias.stride[3], seq.k_len, EDGE).to(tl.float32)
        s += bias
        visible &= bias != -INF
    return s, visible, steepness


@triton.jit
def exponential(x, F: tl.constexpr):
    """exp of a difference of scores."""
    if F.BIAS != "none":
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def kept(i, head, start_n, seed, threshold, BLOCK_N: tl.constexpr):
    """Which entries of a (BLOCK_M, BLOCK_N) tile survive dropout, of queries ``i`` (a column) of batch * head ``head``.

    Philox4x32-10 with key ``seed`` and counter (j // 4, i, head mod 2^32, head div 2^32); word j % 4 belongs to key j.
    start_n is a multiple of 4.
    """
    quad = (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    i = i.to(tl.uint32)
    zero = tl.zeros_like(i + quad)
    head = head.to(tl.uint64)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed), zero + quad, zero + i, zero + head.to(tl.uint32), zero + (head >> 32).to(tl.uint32)
    )
    limit = tl.cast(threshold, tl.uint32, bitcast=True)
    w0 = (w0 >= limit).to(tl.int8)
    w1 = (w1 >= limit).to(tl.int8)
    w2 = (w2 >= limit).to(tl.int8)
    w3 = (w3 >= limit).to(tl.int8)
    # join adds a last dimension: [.., a, b] holds word 2a + b.
    shape: tl.constexpr = (i.shape[0], BLOCK_N)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), shape) != 0
