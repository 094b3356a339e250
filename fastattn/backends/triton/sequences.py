"""Where the sequences of a call lie, and which tiles of keys and queries see each other.

Positions are local to a sequence: query i of [0, q_len), key j of [0, k_len). Key j is visible to query i iff

    lo <= j - i <= hi  or  j < prefix,   and   k_first <= j < k_len,   and   their segments are equal,

and the boolean mask is True there and the bias is not -inf.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

SCAN = tl.constexpr(1024)
FAR = tl.constexpr(2**31 - 1)


class Sizes(NamedTuple):
    """The integers of a call. None of them is compiled in.

    Kernels take them one by one, as ``do_not_specialize``, which Triton does not heed for the elements of a tuple.
    """

    batch: int
    heads_q: int
    group: int  #: query heads of a key head
    seqlen_q: int  #: the longest sequence, where several are packed
    seqlen_k: int
    rows_q: int  #: of lse: seqlen_q, or of all packed sequences together
    lo: int  #: of the window, relative to where the diagonal of a sequence begins
    hi: int
    offset: int  #: of the diagonal itself, for ALiBi
    page_size: int
    splits: int
    threshold: int  #: int32 bits of the uint32 below which a random word drops its entry
    slopes_step: int  #: from one batch entry to the next, like the three that follow
    q_segments_step: int
    k_segments_step: int
    pages_step: int


SIZES = list(Sizes._fields)


class Scales(NamedTuple):
    scores: float  #: of q k^T, its sign aside; without softcap in units of the scores (log2(e) without a bias)
    cap: float  #: softcap in units of the scores
    softmax: float
    dropout: float  #: 1 / (1 - dropout_p)


class Extras(NamedTuple):
    """The tensors of a call beside q, k, v; None where a call has none.

    Kernels take mask and bias apart from the others: they are compiled for the alignment of their rows alone.
    """

    mask: Any  #: Matrix of uint8, nonzero = visible
    bias: Any  #: Matrix
    slopes: Any  #: ALiBi: (batch or 1, heads_q) of float32, contiguous like all that follow
    sinks: Any  #: (heads_q) of float32
    seed: Any  #: one int64
    q_segments: Any  #: (batch or 1, seqlen_q) of int32
    k_segments: Any
    prefix: Any  #: (batch) of int32
    cu_q: Any  #: (batch + 1) of int32
    cu_k: Any
    used_k: Any  #: (batch) of int32
    leftpad_k: Any
    pages: Any  #: (batch, pages) of int32


class Sequence(NamedTuple):
    q_start: Any  #: row of its first query
    q_len: Any
    k_start: Any
    k_first: Any  #: the first key that is not padding
    k_len: Any
    lo: Any
    hi: Any
    offset: Any
    prefix: Any


class Tiles(NamedTuple):
    """Some row of a tile sees something in [begin, end) only; in [full_begin, full_end) every row sees everything.

    begin and full_* are multiples of the tile size. ``gap`` tiles more, from 0 on, come before begin (a prefix).
    """

    gap: Any
    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


@triton.jit
def statistics_row(b, h, seq, sizes, F: tl.constexpr):
    """Where a head's first query lies in lse and delta, (batch, heads_q, rows_q), or (heads_q, rows_q) when packed."""
    if F.CU_Q:
        return tl.cast(h, tl.int64) * sizes.rows_q + seq.q_start
    else:
        return (tl.cast(b, tl.int64) * sizes.heads_q + h) * sizes.rows_q


@triton.jit
def sequence(b, x, sizes, F: tl.constexpr):
    """The sequences of batch entry ``b``."""
    q_start, q_len = 0, sizes.seqlen_q
    if F.CU_Q:
        q_start = tl.load(x.cu_q + b)
        q_len = tl.load(x.cu_q + b + 1) - q_start
    k_start, k_len = 0, sizes.seqlen_k
    if F.CU_K:
        k_start = tl.load(x.cu_k + b)
        k_len = tl.load(x.cu_k + b + 1) - k_start
    if F.USED_K:
        k_len = tl.minimum(tl.load(x.used_k + b), k_len)
    k_first = 0
    if F.LEFTPAD:
        k_first = tl.load(x.leftpad_k + b)
    lo, hi, offset = sizes.lo, sizes.hi, sizes.offset
    if F.BOTTOM_RIGHT:
        lo += k_len - q_len
        hi += k_len - q_len
        offset += k_len - q_len
    prefix = 0
    if F.PREFIX:
        prefix = tl.minimum(tl.load(x.prefix + b), k_len)
    return Sequence(q_start, q_len, k_start, k_first, k_len, lo, hi, offset, prefix)


@triton.jit
def _round_up(x, BLOCK: tl.constexpr):
    return (x + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def _window(first, last, count, lo, hi, BLOCK: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr):
    """The tiles of [0, count) that the rows [first, last] see, row i seeing [i + lo, i + hi]."""
    begin = first * 0
    full_begin = begin
    end = begin + count
    full_end = end
    if HAS_LO:
        begin = tl.maximum(first + lo, 0) // BLOCK * BLOCK
        full_begin = _round_up(tl.maximum(last + lo, 0), BLOCK)
    if HAS_HI:
        end = tl.minimum(end, tl.maximum(last + hi + 1, 0))
        full_end = tl.minimum(end, tl.maximum(first + hi + 1, 0))
    return begin, full_begin, full_end, end


@triton.jit
def _segment_bounds(segments, first, last, BLOCK: tl.constexpr):
    """The least and the largest segment of the rows [first, last], of which BLOCK hold all."""
    row = first + tl.arange(0, BLOCK)
    own = tl.load(segments + row, mask=row <= last, other=0)
    least = tl.min(tl.where(row <= last, own, FAR), 0)
    return least, tl.max(tl.where(row <= last, own, -FAR), 0)


@triton.jit
def _narrow(
    begin, full_begin, full_end, end, least, largest, segments, mask, BLOCK: tl.constexpr,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Drops the tiles before the first and after the last element of a segment in [least, largest], of a true mask.

    A tile is full only if all elements between the first and the last are such, and least = largest. ``segments``
    points at element 0, ``mask`` is (pointer to element 0, stride). Sorted segments and masks of padding lose all that
    they hide.
    """
    lane = tl.arange(0, SCAN)
    firsts = tl.full((SCAN,), FAR, tl.int32)
    lasts = tl.full((SCAN,), -1, tl.int32)
    hits = tl.zeros((SCAN,), tl.int32)
    for start in tl.range(begin, end, SCAN):
        position = start + lane
        hit = position < end
        if SEGMENTS:
            segment = tl.load(segments + position, mask=position < end, other=0)
            hit &= (segment >= least) & (segment <= largest)
        if MASKED:
            hit &= tl.load(mask[0] + position.to(tl.int64) * mask[1], mask=position < end, other=0) != 0
        firsts = tl.minimum(firsts, tl.where(hit, position, FAR))
        lasts = tl.maximum(lasts, tl.where(hit, position, -1))
        hits += hit.to(tl.int32)
    first = tl.min(firsts, 0)
    last = tl.max(lasts, 0)
    end = tl.minimum(end, last + 1)
    begin = tl.minimum(tl.maximum(begin, first // BLOCK * BLOCK), tl.maximum(end, begin))
    whole = tl.sum(hits, 0) == last - first + 1
    if SEGMENTS:
        whole &= least == largest
    full_begin = tl.maximum(full_begin, _round_up(tl.minimum(first, FAR - BLOCK), BLOCK))
    full_end = tl.where(whole, tl.minimum(full_end, end), full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _ordered(gap, begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """The same tiles with begin <= full_begin <= full_end, and begin <= end: a gap comes before an empty range too."""
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return Tiles(gap, begin, full_begin, full_end, tl.maximum(end, begin))


@triton.jit
def key_tiles(first, last, b, h, seq, x, sizes, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, F: tl.constexpr):
    """The tiles of keys that the queries [first, last] (at most BLOCK_M) of head ``h`` see."""
    begin, full_begin, full_end, end = _window(first, last, seq.k_len, seq.lo, seq.hi, BLOCK, F.HAS_LO, F.HAS_HI)
    gap = begin * 0
    if F.PREFIX:
        end = tl.maximum(end, seq.prefix)
        full_end = tl.maximum(full_end, seq.prefix)  # where that is less than full_begin, nothing is full
        if F.HAS_LO:
            gap = tl.minimum(_round_up(seq.prefix, BLOCK), begin)
    if F.LEFTPAD:
        begin = tl.maximum(begin, seq.k_first // BLOCK * BLOCK)
        full_begin = tl.maximum(full_begin, _round_up(seq.k_first, BLOCK))
    if F.SEGMENTS or F.MASK == "key":
        least, largest, segments, mask = 0, 0, None, (None, 0)
        if F.SEGMENTS:
            own = x.q_segments + tl.cast(b, tl.int64) * sizes.q_segments_step
            least, largest = _segment_bounds(own, first, last, BLOCK_M)
            segments = x.k_segments + tl.cast(b, tl.int64) * sizes.k_segments_step
        if F.MASK == "key":
            own = x.mask.data + tl.cast(b, tl.int64) * x.mask.stride[0] + tl.cast(h, tl.int64) * x.mask.stride[1]
            mask = (own, x.mask.stride[3])
        begin, full_begin, full_end, end = _narrow(
            begin, full_begin, full_end, end, least, largest, segments, mask, BLOCK, F.SEGMENTS, F.MASK == "key"
        )
    return _ordered(gap, begin, full_begin, full_end, end, BLOCK)


@triton.jit
def key_tile(t, first, gap, BLOCK: tl.constexpr, F: tl.constexpr):
    """Where tile ``t`` of [0, gap) and then [first, ..) begins."""
    start = first + t * BLOCK
    if F.PREFIX and F.HAS_LO:
        start = tl.where(t * BLOCK < gap, t * BLOCK, start - gap)
    return start


@triton.jit
def query_tiles(first, last, b, hk, seq, x, sizes, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, F: tl.constexpr):
    """The tiles of queries that see the keys [first, last] (at most BLOCK_N) of key head ``hk``."""
    # The window seen from the keys: j sees the queries [j - hi, j - lo].
    begin, full_begin, full_end, end = _window(first, last, seq.q_len, -seq.hi, -seq.lo, BLOCK, F.HAS_HI, F.HAS_LO)
    if F.PREFIX:
        begin = tl.where(first < seq.prefix, 0, begin)
        end = tl.where(first < seq.prefix, seq.q_len, end)
        full_begin = tl.where(last < seq.prefix, 0, full_begin)
        full_end = tl.where(last < seq.prefix, seq.q_len, full_end)
    if F.LEFTPAD:
        full_end = tl.where(first < seq.k_first, full_begin, full_end)
        end = tl.where(last < seq.k_first, begin, end)
    if F.MASK == "key":
        position = first + tl.arange(0, BLOCK_N)
        some = 0
        every = 1
        for g in tl.range(0, sizes.group):
            head = hk * sizes.group + g
            own = x.mask.data + tl.cast(b, tl.int64) * x.mask.stride[0] + tl.cast(head, tl.int64) * x.mask.stride[1]
            pointers = own + position.to(tl.int64) * x.mask.stride[3]
            visible = tl.load(pointers, mask=position <= last, other=0) != 0
            some = some | tl.max(visible.to(tl.int32), 0)
            every = every & tl.min((visible | (position > last)).to(tl.int32), 0)
        full_end = tl.where(every != 0, full_end, full_begin)
        end = tl.where(some != 0, end, begin)
    if F.SEGMENTS:
        own = x.k_segments + tl.cast(b, tl.int64) * sizes.k_segments_step
        least, largest = _segment_bounds(own, first, last, BLOCK_N)
        segments = x.q_segments + tl.cast(b, tl.int64) * sizes.q_segments_step
        begin, full_begin, full_end, end = _narrow(
            begin, full_begin, full_end, end, least, largest, segments, (None, 0), BLOCK, True, False
        )
    end = tl.where(first <= last, end, begin)
    return _ordered(begin * 0, begin, full_begin, full_end, end, BLOCK)
