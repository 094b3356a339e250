// The workspace of the backward, which sm80::prepare fills in part: delta and lse of each query, then the sums of dQ.
#pragma once

#include "cuda/sm90/sequences.h"

namespace fastattn::cuda::sm90 {

// Of each query; the sums begin after both, at a multiple of 128 bytes.
inline int64_t sums_offset_bytes(const AttentionParams& p) { return (2 * 4 * all_rows(p) + 127) / 128 * 128; }
inline float* gradient_sums(const AttentionParams& p) {
    return reinterpret_cast<float*>(static_cast<char*>(p.workspace) + sums_offset_bytes(p));
}

// Floats.
inline int64_t sums_size(const AttentionParams& p, int head_dim) {
    return p.heads_q * SequenceTiles<64>::of_queries(p).count() * 64 * head_dim;
}

// Sums of dQ are kept as the accumulators lie in the threads: for each head and number of a tile of 64 queries
// (sequences.h) head_dim / 64 parts of 64 x 64, each [8 blocks of 8 columns][128 threads][2 rows, 8 apart][2 columns],
// so that threads write 16 bytes without bank conflicts and a part is one run of bytes.
template <int kHeadDim, bool kRagged>
struct GradientSums {
    static constexpr int kParts = kHeadDim / 64, kPart = 64 * 64;

    // Where the columns from col on (a multiple of 8) of a tile begin; up to the end of the part they are one run.
    static FASTATTN_DEVICE float* columns(float* sums, const AttentionParams& p, int64_t h, int64_t number, int col) {
        const int64_t tile = h * SequenceTiles<64, kRagged>::of_queries(p).count() + number;
        return sums + (tile * kParts + col / 64) * kPart + col % 64 / 8 * 512;
    }
    // Where columns col and col + 1 (col even) of query i of a sequence lie, whose first tile has this number.
    static FASTATTN_DEVICE float* pair(float* sums, const AttentionParams& p, int64_t h, int first, int i, int col) {
        const int row = i % 64, thread = row / 16 * 32 + row % 8 * 4 + col % 8 / 2;
        return columns(sums, p, h, first + i / 64, col / 8 * 8) + thread * 4 + row % 16 / 8 * 2;
    }
};

}  // namespace fastattn::cuda::sm90
