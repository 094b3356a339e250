// What the call says about single entries (i, j) of the score matrix: visibility, softcap, slopes, bias, dropout;
// sinks.
#pragma once

#include <cmath>

#include "cuda/band.h"
#include "cuda/philox.h"
#include "cuda/ptx/arithmetic.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/global.h"
#include "params.h"

namespace fastattn::cuda {

// Whether anything but the window, softmax_scale and the sequences' lengths has a say. Only the general kernels ask.
FASTATTN_DEVICE bool by_entry(const AttentionParams& p) {
    return p.mask.data || p.bias.data || p.softcap != 0. || p.alibi_slopes.data || p.q_segments.data ||
           p.prefix_lens.data || p.leftpad_k.data;
}

FASTATTN_DEVICE float read_bias(const AttentionParams& p, int64_t at) {
    switch (p.bias_dtype) {
        case DType::kFloat16:
            return to_float(load_global(&static_cast<const Half*>(p.bias.data)[at]));
        case DType::kBFloat16:
            return to_float(load_global(&static_cast<const BFloat16*>(p.bias.data)[at]));
        default:
            return load_global(&static_cast<const float*>(p.bias.data)[at]);
    }
}

// The rules of batch entry b, whose window and lengths `band` has.
struct EntryRules {
    const AttentionParams& p;
    const Band& band;
    int b;
    float cap, exponent;  // softcap, 0: none; 2 log2(e) / softcap

    FASTATTN_DEVICE EntryRules(const AttentionParams& p, const Band& band, int b)
        : p(p), band(band), b(b), cap(static_cast<float>(p.softcap)), exponent(2.885390081777927f / cap) {}

    // What is the same for all keys of query i of head h.
    struct Row {
        int i;
        int begin, end;   // the window shows the keys [begin, end),
        int pad, prefix;  // the prefix the keys [pad, prefix)
        int segment;
        float slope;
        int64_t mask, bias;  // elements from their first to those of key 0
    };
    // A query that does not exist, i < 0 or i >= band.seqlen_q, sees nothing.
    FASTATTN_DEVICE Row row(int h, int i) const {
        const bool exists = 0 <= i && i < band.seqlen_q;
        Row row = {};
        row.i = i;
        if (p.leftpad_k.data) row.pad = look_up(p.leftpad_k, b);
        row.begin = max32(band.keys_begin(i), row.pad);
        row.end = exists ? band.keys_end(i) : 0;
        if (exists && p.prefix_lens.data) row.prefix = min32(look_up(p.prefix_lens, b), band.seqlen_k);
        if (exists && p.q_segments.data) row.segment = look_up(p.q_segments, b, i);
        if (p.alibi_slopes.data) row.slope = look_up(p.alibi_slopes, b, h);
        row.mask = b * p.mask.stride[0] + h * p.mask.stride[1] + i * p.mask.stride[2];
        row.bias = b * p.bias.stride[0] + h * p.bias.stride[1] + i * p.bias.stride[2];
        return row;
    }

    // Whether key j is visible as far as the bias has no say.
    FASTATTN_DEVICE bool sees(const Row& row, int j) const {
        const bool seen = (row.begin <= j && j < row.end) || (row.pad <= j && j < row.prefix);
        if (!seen) return false;
        if (p.q_segments.data && row.segment != look_up(p.k_segments, b, j)) return false;
        return !p.mask.data || load_global(static_cast<const bool*>(p.mask.data) + row.mask + j * p.mask.stride[3]);
    }

    // softcap tanh(x / softcap) and its derivative, with tanh(x) = 1 - 2 / (1 + e^2x), to about 1e-7.
    FASTATTN_DEVICE float capped(float scaled, float& slope) const {
        slope = 1.f;
        if (cap == 0.f) return scaled;
        const float tanh = 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(scaled * exponent));
        slope = 1.f - tanh * tanh;
        return cap * tanh;
    }

    // The score of a key that is seen, with what is added to it; -inf where the bias hides it.
    FASTATTN_DEVICE float biased(const Row& row, float score, int j) const {
        if (p.alibi_slopes.data) {
            const int64_t distance = row.i + band.offset - j;
            score -= row.slope * static_cast<float>(distance < 0 ? -distance : distance);
        }
        if (!p.bias.data) return score;
        const float bias = read_bias(p, row.bias + j * p.bias.stride[3]);
        return bias == -INFINITY ? bias : score + bias;
    }
};

// Takes the sink, a logit in the denominator only, into a row's lse; returns what its output is to be multiplied with.
FASTATTN_DEVICE float add_sink(float& lse, float sink) {
    constexpr float kToBase2 = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
    const float max = fmaxf(lse, sink);
    if (max == -INFINITY) return 1.f;
    const float weight = exp2_approx((lse - max) * kToBase2);
    const float total = weight + exp2_approx((sink - max) * kToBase2);
    lse = fmaf(log2_approx(total), kLn2, max);
    return weight / total;
}
FASTATTN_DEVICE float sink_of(const AttentionParams& p, int64_t h) {
    return load_global(static_cast<const float*>(p.sinks.data) + h * p.sinks.stride[0]);
}

// The random words of keys j / 4 * 4 .. + 3 for query i.
FASTATTN_DEVICE Philox4 dropout_words(const AttentionParams& p, int64_t b, int64_t h, int i, int j) {
    const uint64_t seed = static_cast<uint64_t>(load_global(p.dropout_seed));
    const uint64_t bh = static_cast<uint64_t>(b * p.heads_q + h);
    const Philox4 counter = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(bh),
                             static_cast<uint32_t>(bh >> 32)};
    return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}
// Word j % 4 drops key j iff it is below the threshold.
FASTATTN_DEVICE bool drops(const AttentionParams& p, const Philox4& words, int j) {
    const uint32_t low = j & 1 ? words.word[1] : words.word[0], high = j & 1 ? words.word[3] : words.word[2];
    return (j & 2 ? high : low) < p.dropout_threshold;
}

}  // namespace fastattn::cuda
