"""Tiles in registers: loads, stores, products, and sums that stay clean of NaN.

A tile as wide as a head is a tuple of one or two tensors: the columns [0, D.MAIN) and, where D.TAIL > 0, the columns
[D.MAIN, D.MAIN + D.TAIL), both powers of two (``configs.Width``). Columns from D.DIM on hold zeros.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.backends.triton.configs import INTERPRET

INTERPRETED = tl.constexpr(INTERPRET)
INF = tl.constexpr(float("inf"))


class Matrix(NamedTuple):
    """A tensor as kernels take it: ``stride`` is (batch, head, row, column), or (batch, head, row)."""

    data: Any
    stride: tuple[int, ...]


class Pages(NamedTuple):
    """Where the keys of one batch entry lie: row ``j`` is row ``j % size`` of page ``table[j // size]``."""

    table: Any
    size: Any


@triton.jit
def at(x, b, h, row):
    """The matrix of one head, beginning at ``row``."""
    return Matrix(
        x.data + tl.cast(b, tl.int64) * x.stride[0] + tl.cast(h, tl.int64) * x.stride[1]
        + tl.cast(row, tl.int64) * x.stride[2],
        x.stride,
    )  # fmt: skip


@triton.jit
def key_pointers(x, pages, j, PAGED: tl.constexpr):
    """Pointers to the rows ``j`` (which must exist) of keys or values."""
    if PAGED:
        page = tl.load(pages.table + j // pages.size).to(tl.int64)
        return x.data + page * x.stride[0] + (j % pages.size).to(tl.int64) * x.stride[2]
    else:
        return x.data + tl.cast(j, tl.int64) * x.stride[2]


@triton.jit
def _load_part(rows, step, exists, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr):
    col = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = rows[:, None] + col.to(tl.int64) * step
    if EDGE:
        return tl.load(pointers, mask=exists[:, None] & (col < D.DIM), other=0.0)
    elif FIRST + WIDTH > D.DIM:
        return tl.load(pointers, mask=col < D.DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(rows, step, exists, D: tl.constexpr, EDGE: tl.constexpr):
    """The rows at the pointers ``rows``; with EDGE only those that ``exist``, zeros in the others."""
    main = _load_part(rows, step, exists, D, 0, D.MAIN, EDGE)
    if D.TAIL == 0:
        return (main,)
    else:
        return (main, _load_part(rows, step, exists, D, D.MAIN, D.TAIL, EDGE))


@triton.jit
def load_tile(x, start, count, BLOCK: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr):
    """Rows [start, start + BLOCK) of a matrix of ``count`` rows; without EDGE they are known to exist."""
    row = tl.arange(0, BLOCK)
    # One 64-bit product for the tile; the rest does not change from tile to tile.
    rows = x.data + tl.cast(start, tl.int64) * x.stride[2] + row.to(tl.int64) * x.stride[2]
    return load_rows(rows, x.stride[3], row < count - start, D, EDGE)


@triton.jit
def describe(x, count, BLOCK: tl.constexpr, D: tl.constexpr):
    """Tensor descriptors of a matrix, one for each part of its width."""
    rows = tl.cast(count, tl.int32)
    main = tl.make_tensor_descriptor(x.data, [rows, D.DIM], [x.stride[2], 1], [BLOCK, D.MAIN])
    if D.TAIL == 0:
        return (main,)
    else:
        return (main, tl.make_tensor_descriptor(x.data, [rows, D.DIM], [x.stride[2], 1], [BLOCK, D.TAIL]))


@triton.jit
def load_keys(
    x, described, pages, start, first, count,
    BLOCK: tl.constexpr, D: tl.constexpr, F: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The keys or values [start, start + BLOCK), zeros outside [first, count)."""
    if DESCRIPTORS:
        if D.TAIL == 0:
            return (described[0].load([start, 0]),)
        else:
            return (described[0].load([start, 0]), described[1].load([start, D.MAIN]))
    else:
        row = tl.arange(0, BLOCK)
        exists = row < count - start
        if F.LEFTPAD:
            exists &= row >= first - start
        if F.PAGED:
            # A row that does not exist takes the place of one that does: its page would be read out of bounds.
            rows = key_pointers(x, pages, tl.minimum(start + row, count - 1), True)
        else:
            rows = x.data + tl.cast(start, tl.int64) * x.stride[2] + row.to(tl.int64) * x.stride[2]
        return load_rows(rows, x.stride[3], exists, D, EDGE)


@triton.jit
def zeros(BLOCK: tl.constexpr, D: tl.constexpr):
    main = tl.full((BLOCK, D.MAIN), 0.0, tl.float32)
    if D.TAIL == 0:
        return (main,)
    else:
        return (main, tl.full((BLOCK, D.TAIL), 0.0, tl.float32))


@triton.jit
def times(tile, factor, D: tl.constexpr):
    """The tile times a factor: a number, or a column."""
    if D.TAIL == 0:
        return (tile[0] * factor,)
    else:
        return (tile[0] * factor, tile[1] * factor)


@triton.jit
def plus(a, b, D: tl.constexpr):
    if D.TAIL == 0:
        return (a[0] + b[0],)
    else:
        return (a[0] + b[0], a[1] + b[1])


@triton.jit
def only(tile, where, D: tl.constexpr):
    """The tile where a column is true, zeros elsewhere."""
    if D.TAIL == 0:
        return (tl.where(where, tile[0], 0.0),)
    else:
        return (tl.where(where, tile[0], 0.0), tl.where(where, tile[1], 0.0))


@triton.jit
def negated(tile, D: tl.constexpr):
    main = (-tile[0].to(tl.float32)).to(tile[0].dtype)
    if D.TAIL == 0:
        return (main,)
    else:
        return (main, (-tile[1].to(tl.float32)).to(tile[1].dtype))


@triton.jit
def _store_part(x, rows, value, exists, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    col = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = rows[:, None] + col.to(tl.int64) * x.stride[3]
    tl.store(pointers, value.to(x.data.dtype.element_ty), mask=exists[:, None] & (col < D.DIM))


@triton.jit
def store_rows(x, rows, tile, exists, D: tl.constexpr):
    """Writes the rows that exist, in the type of ``x``, to the pointers ``rows``."""
    _store_part(x, rows, tile[0], exists, D, 0, D.MAIN)
    if D.TAIL != 0:
        _store_part(x, rows, tile[1], exists, D, D.MAIN, D.TAIL)


@triton.jit
def _dot(a, b, F: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16; a product of float32 copies is exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=F.PRECISION)


@triton.jit
def matmul(a, b, D: tl.constexpr, F: tl.constexpr):
    """a @ b^T in float32."""
    if D.TAIL == 0:
        return _dot(a[0], tl.trans(b[0]), F)
    else:
        return _dot(a[0], tl.trans(b[0]), F) + _dot(a[1], tl.trans(b[1]), F)


@triton.jit
def _add_product(weights, x, acc, F: tl.constexpr):
    weights = weights.to(x.dtype)
    if INTERPRETED:
        weights = weights.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(weights, x, acc, input_precision=F.PRECISION)


@triton.jit
def add_product(acc, weights, x, D: tl.constexpr, F: tl.constexpr):
    """acc + weights @ x, with the weights (float32) rounded to the type of x."""
    main = _add_product(weights, x[0], acc[0], F)
    if D.TAIL == 0:
        return (main,)
    else:
        return (main, _add_product(weights, x[1], acc[1], F))


@triton.jit
def _add_row(acc, weight, seen, pointer, step, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    col = FIRST + tl.arange(0, WIDTH)
    row = tl.load(pointer + col.to(tl.int64) * step, mask=col < D.DIM, other=0.0).to(tl.float32)
    return acc + tl.where(seen[:, None] != 0, weight[:, None] * row[None, :], 0.0)


@triton.jit
def careful_product(
    acc, weights, visible, x, pages, start, count, BLOCK: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr
):
    """acc + weights @ x[start : start + BLOCK], where a row of x reaches only the rows of acc that see it.

    One row of x after the other, which needs no registers beyond acc. 0 * NaN of an invisible entry is not formed.
    """
    index = tl.arange(0, BLOCK)[None, :]
    for n in tl.range(0, tl.minimum(BLOCK, count - start)):
        pointer = key_pointers(x, pages, start + n, PAGED)
        weight = tl.sum(tl.where(index == n, weights, 0.0), 1)
        seen = tl.max(tl.where((index == n) & visible, 1, 0), 1)
        main = _add_row(acc[0], weight, seen, pointer, x.stride[3], D, 0, D.MAIN)
        if D.TAIL == 0:
            acc = (main,)
        else:
            acc = (main, _add_row(acc[1], weight, seen, pointer, x.stride[3], D, D.MAIN, D.TAIL))
    return acc


@triton.jit
def _nonfinite(part, exists):
    broken = tl.where(exists[:, None] & ((part != part) | (tl.abs(part) == INF)), 1, 0)
    return tl.max(tl.max(broken, 1), 0)


@triton.jit
def has_nonfinite(tile, exists, D: tl.constexpr):
    """Whether a row of the tile that exists holds NaN or inf."""
    if D.TAIL == 0:
        return _nonfinite(tile[0], exists) != 0
    else:
        return (_nonfinite(tile[0], exists) | _nonfinite(tile[1], exists)) != 0
