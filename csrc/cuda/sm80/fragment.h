// Products of tiles with mma.m16n8k16: operands from shared memory or registers, float accumulators in registers.
//
// PTX ISA, "Matrix Fragments for mma.m16n8k16": entry e of a lane's accumulator is at row lane / 4 + 8 (e / 2) and
// column 2 (lane % 4) + e % 2 of the 16 x 8 tile. Two neighbouring accumulators, rounded and packed in pairs, are
// exactly the A operand of a 16 x 16 tile: P goes from one product into the next without leaving registers.
#pragma once

#include "cuda/ptx/convert.h"
#include "cuda/ptx/execution.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shuffle.h"
#include "cuda/swizzle.h"

namespace fastattn::cuda::sm80 {

FASTATTN_DEVICE int lane() { return lane_index(); }
FASTATTN_DEVICE int warp() { return thread_index() / 32; }
FASTATTN_DEVICE int fragment_row(int e) { return (lane() >> 2) + 8 * (e >> 1); }
FASTATTN_DEVICE int fragment_col(int e) { return 2 * (lane() & 3) + (e & 1); }

template <int kM, int kN>
FASTATTN_DEVICE void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.f;
        }
    }
}

// Whether an entry of the rows that exist (a bit each: 2 m + e / 2) is NaN or infinite.
template <int kM, int kN>
FASTATTN_DEVICE bool any_nonfinite(const float (&acc)[kM][kN][4], uint32_t rows) {
    bool found = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = 0.f;  // 0 * x is 0 for every finite x, NaN for all others
#pragma unroll
            for (int n = 0; n < kN; ++n) sum += 0.f * acc[m][n][2 * half] + 0.f * acc[m][n][2 * half + 1];
            found = found || (sum != 0.f && (rows >> (2 * m + half) & 1));
        }
    }
    return found;
}

// acc += A B^T: rows of A against rows of B, kInner columns. Row block m of A is at a + m * kStep rows.
template <typename T, int kInner, int kStep, int kM, int kN>
FASTATTN_DEVICE void multiply_rows(float (&acc)[kM][kN][4], uint32_t a, uint32_t b) {
    using Tile = SwizzledTile<kInner>;
    static_assert(kN % 2 == 0 && kStep % 16 == 0);
    const uint32_t a_row = lane() & 15, a_chunk = lane() >> 4;
    const uint32_t b_row = (lane() & 7) + ((lane() >> 4) << 3), b_chunk = (lane() >> 3) & 1;
    const uint32_t a_lane = a + Tile::offset(a_row, a_chunk), b_lane = b + Tile::offset(b_row, b_chunk);
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k) {
        uint32_t a_fragment[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            ldmatrix_x4(a_fragment[m], Tile::advance(a_lane, 2 * k) + Tile::bytes(m * kStep));
        }
#pragma unroll
        for (int n = 0; n < kN / 2; ++n) {
            uint32_t b_fragment[4];
            ldmatrix_x4(b_fragment, Tile::advance(b_lane, 2 * k) + Tile::bytes(16 * n));
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma_m16n8k16<T>(acc[m][2 * n], a_fragment[m], b_fragment[0], b_fragment[1]);
                mma_m16n8k16<T>(acc[m][2 * n + 1], a_fragment[m], b_fragment[2], b_fragment[3]);
            }
        }
    }
}

// The A operand made of accumulators 2 k and 2 k + 1 of a row block.
template <typename T, int kN>
FASTATTN_DEVICE void pack_fragment(uint32_t (&a)[4], const float (&acc)[kN][4], int k) {
    a[0] = pack<T>(acc[2 * k][0], acc[2 * k][1]);
    a[1] = pack<T>(acc[2 * k][2], acc[2 * k][3]);
    a[2] = pack<T>(acc[2 * k + 1][0], acc[2 * k + 1][1]);
    a[3] = pack<T>(acc[2 * k + 1][2], acc[2 * k + 1][3]);
}

// The A operand at rows m0 .. m0 + 15 and columns k0 .. k0 + 15 (multiples of 16) of a tile.
template <int kCols>
FASTATTN_DEVICE void load_fragment(uint32_t (&a)[4], uint32_t tile, int m0, int k0) {
    using Tile = SwizzledTile<kCols>;
    ldmatrix_x4(a, tile + Tile::bytes(m0) + Tile::offset(lane() & 15, (lane() >> 4) + k0 / 8));
}

// The A operand at rows m0 .. m0 + 15 (a multiple of 8) and columns k0 .. k0 + 15 of the transpose of a tile.
template <int kCols>
FASTATTN_DEVICE void load_transposed_fragment(uint32_t (&a)[4], uint32_t tile, int m0, int k0) {
    using Tile = SwizzledTile<kCols>;
    const uint32_t row = (lane() & 7) + ((lane() >> 4) << 3), chunk = (lane() >> 3) & 1;
    ldmatrix_x4_trans(a, tile + Tile::bytes(k0) + Tile::offset(row, chunk + m0 / 8));
}

// The columns of accumulator pair n where kGroups warps take blocks of 32 columns in turn, in chunks of 8.
template <int kGroups>
FASTATTN_DEVICE constexpr int pair_chunk(int n) {
    return kGroups == 1 ? 2 * n : n / 2 * 4 * kGroups + n % 2 * 2;
}

// acc += A B for 16 rows of B, whose tile has kCols columns. With kGroups > 1 acc holds blocks of 32 columns: the
// `group`th, the one kGroups further, and so on.
template <typename T, int kCols, int kGroups, int kM, int kN>
FASTATTN_DEVICE void multiply_columns(float (&acc)[kM][kN][4], const uint32_t (&a)[kM][4], uint32_t b, int group) {
    using Tile = SwizzledTile<kCols>;
    static_assert(kN % 2 == 0);
    const uint32_t b_lane = b + Tile::offset(lane() & 15, (lane() >> 4) + 4 * group);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
        uint32_t b_fragment[4];
        ldmatrix_x4_trans(b_fragment, Tile::advance(b_lane, pair_chunk<kGroups>(n)));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            mma_m16n8k16<T>(acc[m][2 * n], a[m], b_fragment[0], b_fragment[1]);
            mma_m16n8k16<T>(acc[m][2 * n + 1], a[m], b_fragment[2], b_fragment[3]);
        }
    }
}

// 16-bit patterns.
template <typename T>
struct Bits16;
template <>
struct Bits16<Half> {
    static constexpr uint32_t kInfinity = 0x7c00, kOne = 0x3c00, k32 = 0x5000, k33 = 0x5020;
};
template <>
struct Bits16<BFloat16> {
    static constexpr uint32_t kInfinity = 0x7f80, kOne = 0x3f80, k32 = 0x4200, k33 = 0x4204;
};

constexpr float kInvisible = -0.f;  // in P and dS, where no visible entry is -0

// The same where A may be 0 against NaN or inf because its entry is invisible (kInvisible): 0 * NaN must not be formed.
//
// B's finite part is multiplied as it is. Its other part is only counted, over the visible entries: +inf as 1, -inf as
// 32, NaN as both (at most 16 rows, so the counts do not meet), and where a count is not 0 its infinity is added.
//
// An infinity of B against a negative entry of A gets the wrong sign: only dS has those, and an infinite q or k has
// made its row of dS NaN already.
template <typename T, int kCols, int kGroups, int kM, int kN>
FASTATTN_DEVICE void multiply_columns_visible(float (&acc)[kM][kN][4], const uint32_t (&a)[kM][4], uint32_t b,
                                              int group) {
    using Tile = SwizzledTile<kCols>;
    using Bits = Bits16<T>;
    const uint32_t b_lane = b + Tile::offset(lane() & 15, (lane() >> 4) + 4 * group);
    uint32_t visible[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            visible[m][e] = ((a[m][e] & 0xffffu) != 0x8000u ? Bits::kOne : 0u) |
                            ((a[m][e] >> 16) != 0x8000u ? Bits::kOne << 16 : 0u);
        }
    }
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
        uint32_t finite[4], strange[4] = {};
        ldmatrix_x4_trans(finite, Tile::advance(b_lane, pair_chunk<kGroups>(n)));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int shift = 0; shift < 32; shift += 16) {
                const uint32_t bits = finite[e] >> shift & 0xffffu;
                if ((bits & Bits::kInfinity) != Bits::kInfinity) continue;
                uint32_t count = bits & 0x8000u ? Bits::k32 : Bits::kOne;
                if ((bits & 0x7fffu) != Bits::kInfinity) count = Bits::k33;
                strange[e] |= count << shift;
                finite[e] &= ~(0xffffu << shift);
            }
        }
        const bool clean = !any_lane((strange[0] | strange[1] | strange[2] | strange[3]) != 0);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float (&to)[4] = acc[m][2 * n + half];
                mma_m16n8k16<T>(to, a[m], finite[2 * half], finite[2 * half + 1]);
                if (clean) continue;
                float counts[4] = {0.f, 0.f, 0.f, 0.f};
                mma_m16n8k16<T>(counts, visible[m], strange[2 * half], strange[2 * half + 1]);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const uint32_t count = float_bits(counts[e] + 0x1p23f);  // an integer in the low bits
                    if (count & 31) to[e] += INFINITY;
                    if (count & 0x3e0) to[e] -= INFINITY;
                }
            }
        }
    }
}

}  // namespace fastattn::cuda::sm80
