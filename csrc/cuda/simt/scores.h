// From q k^T to scores: scale, bias, visibility, dropout, for the 4 x 4 entries of a thread.
#pragma once

#include "cuda/entries.h"
#include "cuda/ptx/opaque.h"
#include "cuda/simt/tile.h"

namespace fastattn::cuda::simt {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInvisible = -0.f;  // in P and dS; see multiply()

// Where a thread's 4 x 4 entries lie: rows i .. i + 3, keys j .. j + 3, j a multiple of 4.
struct Position {
    int h, i, j;
};

// The tiles of keys for kBlock queries, of queries for kBlock keys.
FASTATTN_DEVICE TileRange key_tiles(const AttentionParams& p, const Band& band, int i0) {
    return p.prefix_lens.data ? Band::all_tiles(band.seqlen_k, kBlock)
                              : band.key_tiles(i0, min32(i0 + kBlock, band.seqlen_q) - 1, kBlock);
}
FASTATTN_DEVICE TileRange query_tiles(const AttentionParams& p, const Band& band, int j0) {
    return p.prefix_lens.data && j0 < band.seqlen_k ? Band::all_tiles(band.seqlen_q, kBlock)
                                                    : band.query_tiles(j0, j0 + kBlock - 1, kBlock);
}

// One bit for each of the 4 x 4 entries.
struct Bits {
    uint32_t bits = 0;
    FASTATTN_DEVICE void set(int r, int c) { bits |= 1u << (4 * r + c); }
    FASTATTN_DEVICE bool at(int r, int c) const { return (bits >> (4 * r + c)) & 1u; }
};

template <typename T>
FASTATTN_DEVICE void write_element(void* data, int64_t offset, float value) {
    T element;
    from_float(value, element);
    store_global(static_cast<T*>(data) + offset, element);
}

FASTATTN_DEVICE void write_dbias(const AttentionParams& p, int64_t offset, float value) {
    switch (p.bias_dtype) {
        case DType::kFloat16:
            return write_element<Half>(p.dbias.data, offset, value);
        case DType::kBFloat16:
            return write_element<BFloat16>(p.dbias.data, offset, value);
        default:
            return write_element<float>(p.dbias.data, offset, value);
    }
}

// What is visible.
FASTATTN_DEVICE Bits visible_entries(const EntryRules& rules, const Position& at) {
    Bits visible;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const EntryRules::Row row = rules.row(at.h, opaque(at.i + r));
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (rules.sees(row, at.j + c) && rules.biased(row, 0.f, at.j + c) != -INFINITY) visible.set(r, c);
        }
    }
    return visible;
}

// What dropout keeps: one Philox call gives the four keys of a row.
FASTATTN_DEVICE Bits dropout_keep(const EntryRules& rules, const Position& at) {
    Bits keep;
    if (rules.p.dropout_threshold == 0) {
        keep.bits = 0xffffu;
        return keep;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const Philox4 random = dropout_words(rules.p, rules.b, at.h, at.i + r, at.j);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (random.word[c] >= rules.p.dropout_threshold) keep.set(r, c);
        }
    }
    return keep;
}

}  // namespace fastattn::cuda::simt
