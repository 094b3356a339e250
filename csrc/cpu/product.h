// The register-blocked product of a tile.
#pragma once

#include <vector>

#include "vector.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// Memory that will be read soon, asked for line by line between multiply-adds: a core has some 20 lines on their way,
// and waits when it asks for more at once.
class Ahead {
public:
    static constexpr int64_t kLine = 64;

    void add(const void* from, int64_t bytes) { parts_.push_back({static_cast<const char*>(from), bytes}); }

    // Where the next `lines` lines begin, of which the last may lie beyond what was added; null where none is left.
    const char* take(int64_t lines) {
        if (parts_.empty()) return nullptr;
        Part& part = parts_.back();
        const char* from = part.from;
        part.from += lines * kLine, part.bytes -= lines * kLine;
        if (part.bytes <= 0) parts_.pop_back();
        return from;
    }

    static void ask(const void* from, int64_t bytes) {
        for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
    }
    void ask_for_the_rest() {
        for (const Part& part : parts_) ask(part.from, part.bytes);
        parts_.clear();
    }

private:
    struct Part {
        const char* from;
        int64_t bytes;
    };
    std::vector<Part> parts_;
};

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
                                                         int64_t b_stride, int64_t depth, C* c, int64_t c_stride,
                                                         Ahead* ahead) {
    static_assert(sizeof(E) == sizeof(C), "a lane of elements is a lane of sums");
    const char* line = ahead == nullptr ? nullptr : ahead->take(depth);
    const int64_t next_line = line == nullptr ? 0 : Ahead::kLine;
    if (line == nullptr) line = reinterpret_cast<const char*>(b);  // which is at hand
    if constexpr (vectors == kTileVectors) b_stride = kPanel<E>;   // a whole panel: the compiler may count on it
    Vector<C> sum[rows][vectors];
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) sum[i][u] = Vector<C>{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        __builtin_prefetch(line, 0, 2);
        line += next_line;
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
void multiply_rows(int64_t rows, Left<E> left, const E* b, int64_t b_stride, int64_t depth, C* c, int64_t c_stride,
                   Ahead* ahead) {
    // Narrow tiles take more rows: the accumulators must outnumber latency x throughput, the loads not the products.
    constexpr int kMost = vectors <= kTileVectors / 2 ? 2 * kTileRows : kTileRows;
    for (; rows >= kMost; rows -= kMost, left.a += kMost * left.row, c += kMost * c_stride) {
        multiply_tile<E, kMost, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c, c_stride,
                                                     ahead);
    }
    if constexpr (kMost > kTileRows) {
        if (rows >= kTileRows) {
            multiply_tile<E, kTileRows, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c,
                                                             c_stride, ahead);
            rows -= kTileRows, left.a += kTileRows * left.row, c += kTileRows * c_stride;
        }
    }
    switch (rows) {
#define FASTATTN_ROWS(n)                                                                                               \
    case n:                                                                                                            \
        return multiply_tile<E, n, vectors, accumulate>(left.a, left.row, left.depth, b, b_stride, depth, c, c_stride, \
                                                        ahead)
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
                     int64_t columns, Ahead* ahead = nullptr) {
    switch (columns / kLanes<E>) {
        case 1:
            return multiply_rows<E, 1, accumulate>(rows, left, b, b_stride, depth, c, c_stride, ahead);
        case 2:
            return multiply_rows<E, 2, accumulate>(rows, left, b, b_stride, depth, c, c_stride, ahead);
        case 3:
            if constexpr (kTileVectors > 2) {
                return multiply_rows<E, 3, accumulate>(rows, left, b, b_stride, depth, c, c_stride, ahead);
            }
            return;
        default:
            if constexpr (kTileVectors > 2) {
                return multiply_rows<E, 4, accumulate>(rows, left, b, b_stride, depth, c, c_stride, ahead);
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
