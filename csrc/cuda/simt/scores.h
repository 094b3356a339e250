// From q k^T to scores: scale, bias, visibility, dropout, for the 4 x 4 entries of a thread.
#pragma once

#include "cuda/philox.h"
#include "cuda/simt/tile.h"
#include "cuda/window.h"

namespace fastattn::cuda::simt {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInvisible = -0.f;  // in P and dS; see multiply()

// Where a thread's 4 x 4 entries lie: rows i .. i + 3, keys j .. j + 3, j a multiple of 4.
struct Position {
    int64_t b, h, i, j;
};

// One bit for each of the 4 x 4 entries.
struct Bits {
    uint32_t bits = 0;
    FASTATTN_DEVICE void set(int r, int c) { bits |= 1u << (4 * r + c); }
    FASTATTN_DEVICE bool at(int r, int c) const { return (bits >> (4 * r + c)) & 1u; }
};

FASTATTN_DEVICE float read_bias(const AttentionParams& p, int64_t offset) {
    switch (p.bias_dtype) {
        case DType::kFloat16:
            return to_float(load_global(static_cast<const Half*>(p.bias.data) + offset));
        case DType::kBFloat16:
            return to_float(load_global(static_cast<const BFloat16*>(p.bias.data) + offset));
        default:
            return load_global(static_cast<const float*>(p.bias.data) + offset);
    }
}

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

// s = softmax_scale * s + bias where visible, -inf elsewhere; returns what is visible.
FASTATTN_DEVICE Bits finish_scores(const AttentionParams& p, const Position& at, Accumulator& s) {
    const float scale = static_cast<float>(p.softmax_scale);
    const int64_t mask_head = at.b * p.mask.stride[0] + at.h * p.mask.stride[1];
    const int64_t bias_head = at.b * p.bias.stride[0] + at.h * p.bias.stride[1];
    Bits visible;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int64_t i = at.i + r;
        // The row's visible columns c: first <= c < end.
        const Range window = visible_keys(p, i, min64(i + 1, p.seqlen_q), 1);
        const int first = static_cast<int>(max64(0, min64(4, window.begin - at.j)));
        const int end = i < p.seqlen_q ? static_cast<int>(max64(0, min64(4, window.end - at.j))) : 0;
        const int64_t mask_row = mask_head + i * p.mask.stride[2] + at.j * p.mask.stride[3];
        const int64_t bias_row = bias_head + i * p.bias.stride[2] + at.j * p.bias.stride[3];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float score = s[r][c] * scale;
            bool ok = first <= c && c < end;
            if (ok && p.mask.data)
                ok = load_global(static_cast<const bool*>(p.mask.data) + mask_row + c * p.mask.stride[3]);
            if (ok && p.bias.data) {
                const float bias = read_bias(p, bias_row + c * p.bias.stride[3]);
                ok = bias != -INFINITY;
                score += bias;
            }
            s[r][c] = ok ? score : -INFINITY;
            if (ok) visible.set(r, c);
        }
    }
    return visible;
}

// What dropout keeps: one Philox call gives the four keys of a row.
FASTATTN_DEVICE Bits dropout_keep(const AttentionParams& p, const Position& at) {
    Bits keep;
    if (p.dropout_threshold == 0) {
        keep.bits = 0xffffu;
        return keep;
    }
    const uint64_t seed = static_cast<uint64_t>(load_global(p.dropout_seed));
    const uint64_t bh = static_cast<uint64_t>(at.b * p.heads_q + at.h);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const Philox4 counter = {static_cast<uint32_t>(at.j / 4), static_cast<uint32_t>(at.i + r),
                                 static_cast<uint32_t>(bh), static_cast<uint32_t>(bh >> 32)};
        const Philox4 random = philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (random.word[c] >= p.dropout_threshold) keep.set(r, c);
        }
    }
    return keep;
}

}  // namespace fastattn::cuda::simt
