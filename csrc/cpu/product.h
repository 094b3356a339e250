// The register-blocked product of a tile.
#pragma once

#include "vector.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// c (rows x vectors) = [c +] a (rows x depth) · b (depth x vectors); a is broadcast element by element, b's rows lie
// b_stride apart. The product is summed by itself before it is added: the rounding of a long sum then grows with its
// tiles, not with its terms.
template <typename C, int rows, int vectors, bool accumulate>
__attribute__((always_inline)) inline void multiply_tile(const C* a, int64_t a_row, int64_t a_depth, const C* b,
                                                         int64_t b_stride, int64_t depth, C* c, int64_t c_stride) {
    if constexpr (vectors == kTileVectors) b_stride = kPanel<C>;  // a whole panel: the compiler may count on it
    Vector<C> sum[rows][vectors];
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) sum[i][u] = Vector<C>{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vector<C> right[vectors];
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) right[u] = load<C>(b + u * kLanes<C>);
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i) {
            const Vector<C> left = splat(a[i * a_row]);
#pragma GCC unroll 4
            for (int u = 0; u < vectors; ++u) sum[i][u] += left * right[u];
        }
        a += a_depth, b += b_stride;
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) {
            C* to = c + i * c_stride + u * kLanes<C>;
            store<C>(to, accumulate ? load<C>(to) + sum[i][u] : sum[i][u]);
        }
    }
}

// Left-hand operand: element (i, k) at a[i * row + k * depth].
template <typename C>
struct Left {
    const C* a;
    int64_t row, depth;
};

template <typename C, int vectors, bool accumulate>
void multiply_rows(int64_t rows, Left<C> left, const C* b, int64_t b_stride, int64_t depth, C* c, int64_t c_stride) {
    // Narrow tiles take more rows: the accumulators must outnumber latency x throughput, the loads not the products.
    constexpr int kMost = vectors <= kTileVectors / 2 ? 2 * kTileRows : kTileRows;
    for (; rows >= kMost; rows -= kMost, left.a += kMost * left.row, c += kMost * c_stride) {
        multiply_tile<C, kMost, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c, c_stride);
    }
    if constexpr (kMost > kTileRows) {
        if (rows >= kTileRows) {
            multiply_tile<C, kTileRows, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c,
                                                             c_stride);
            rows -= kTileRows, left.a += kTileRows * left.row, c += kTileRows * c_stride;
        }
    }
    switch (rows) {
#define FASTATTN_ROWS(n) \
    case n:              \
        return multiply_tile<C, n, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c, c_stride)
        FASTATTN_ROWS(1);
        FASTATTN_ROWS(2);
        FASTATTN_ROWS(3);
        FASTATTN_ROWS(4);
        FASTATTN_ROWS(5);
#undef FASTATTN_ROWS
        default:
            return;
    }
}

// c (rows x columns) = [c +] left (rows x depth) · b (depth x columns), columns a multiple of kLanes up to kPanel.
template <typename C, bool accumulate>
inline void multiply(int64_t rows, Left<C> left, const C* b, int64_t b_stride, int64_t depth, C* c, int64_t c_stride,
                     int64_t columns) {
    switch (columns / kLanes<C>) {
        case 1:
            return multiply_rows<C, 1, accumulate>(rows, left, b, b_stride, depth, c, c_stride);
        case 2:
            return multiply_rows<C, 2, accumulate>(rows, left, b, b_stride, depth, c, c_stride);
        case 3:
            if constexpr (kTileVectors > 2) {
                return multiply_rows<C, 3, accumulate>(rows, left, b, b_stride, depth, c, c_stride);
            }
            return;
        default:
            if constexpr (kTileVectors > 2) {
                return multiply_rows<C, 4, accumulate>(rows, left, b, b_stride, depth, c, c_stride);
            }
    }
}

// c += left · b, passing over every zero of left: an unseen NaN or inf in b then has no part in the sum.
template <typename C>
inline void multiply_nonzero(int64_t rows, Left<C> left, const C* b, int64_t b_stride, int64_t depth, C* c,
                             int64_t c_stride, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < depth; ++k) {
            const C x = left.a[i * left.row + k * left.depth];
            if (x == 0) continue;
            for (int64_t u = 0; u < columns; ++u) c[i * c_stride + u] += x * b[k * b_stride + u];
        }
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
