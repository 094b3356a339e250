// The register-blocked product of a tile.
#pragma once

#include "vector.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// sum + a · b in each lane; of pairs both products.
template <typename E, typename C>
__attribute__((always_inline)) inline Vector<C> multiply_add(Vector<C> sum, Vector<E> a, Vector<E> b) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<E, Pair>) {
        return (Vector<C>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    } else
#endif
    {
        return sum + a * b;
    }
}

// c (rows x vectors) = [c +] a (rows x depth) · b (depth x vectors); a is broadcast element by element, b's rows lie
// b_stride apart. The product is summed by itself before it is added: the rounding of a long sum then grows with its
// tiles, not with its terms. E: elements of a and b, numbers of type C or pairs of narrower ones.
template <typename E, int rows, int vectors, bool accumulate, typename C>
__attribute__((always_inline)) inline void multiply_tile(const E* a, int64_t a_row, int64_t a_depth, const E* b,
                                                         int64_t b_stride, int64_t depth, C* c, int64_t c_stride) {
    static_assert(sizeof(E) == sizeof(C), "a lane of elements is a lane of sums");
    if constexpr (vectors == kTileVectors) b_stride = kPanel<E>;  // a whole panel: the compiler may count on it
    Vector<C> sum[rows][vectors];
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) sum[i][u] = Vector<C>{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vector<E> right[vectors];
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) right[u] = load<E>(b + u * kLanes<E>);
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i) {
            const Vector<E> left = splat(a[i * a_row]);
#pragma GCC unroll 4
            for (int u = 0; u < vectors; ++u) sum[i][u] = multiply_add<E, C>(sum[i][u], left, right[u]);
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
template <typename E>
struct Left {
    const E* a;
    int64_t row, depth;
};

template <typename E, int vectors, bool accumulate, typename C>
void multiply_rows(int64_t rows, Left<E> left, const E* b, int64_t b_stride, int64_t depth, C* c, int64_t c_stride) {
    // Narrow tiles take more rows: the accumulators must outnumber latency x throughput, the loads not the products.
    constexpr int kMost = vectors <= kTileVectors / 2 ? 2 * kTileRows : kTileRows;
    for (; rows >= kMost; rows -= kMost, left.a += kMost * left.row, c += kMost * c_stride) {
        multiply_tile<E, kMost, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c, c_stride);
    }
    if constexpr (kMost > kTileRows) {
        if (rows >= kTileRows) {
            multiply_tile<E, kTileRows, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c,
                                                             c_stride);
            rows -= kTileRows, left.a += kTileRows * left.row, c += kTileRows * c_stride;
        }
    }
    switch (rows) {
#define FASTATTN_ROWS(n) \
    case n:              \
        return multiply_tile<E, n, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c, c_stride)
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
template <typename E, bool accumulate, typename C>
inline void multiply(int64_t rows, Left<E> left, const E* b, int64_t b_stride, int64_t depth, C* c, int64_t c_stride,
                     int64_t columns) {
    switch (columns / kLanes<E>) {
        case 1:
            return multiply_rows<E, 1, accumulate>(rows, left, b, b_stride, depth, c, c_stride);
        case 2:
            return multiply_rows<E, 2, accumulate>(rows, left, b, b_stride, depth, c, c_stride);
        case 3:
            if constexpr (kTileVectors > 2) {
                return multiply_rows<E, 3, accumulate>(rows, left, b, b_stride, depth, c, c_stride);
            }
            return;
        default:
            if constexpr (kTileVectors > 2) {
                return multiply_rows<E, 4, accumulate>(rows, left, b, b_stride, depth, c, c_stride);
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
