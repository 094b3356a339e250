// What the call says about single entries (i, j) of the score matrix, beyond the window.
#pragma once

#include <cmath>

#include "cuda/band.h"
#include "cuda/philox.h"
#include "cuda/ptx/arithmetic.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/global.h"
#include "params.h"

namespace fastattn::cuda::sm80 {

template <typename T>
FASTATTN_DEVICE T look_up(const Table<T>& table, int64_t first, int64_t second = 0) {
    return load_global(&table.data[first * table.stride[0] + second * table.stride[1]]);
}

// Whether anything but the window, softmax_scale and seqused_k has a say. Only the general kernels ask.
FASTATTN_DEVICE bool by_entry(const AttentionParams& p) {
    return p.mask.data || p.bias.data || p.softcap != 0. || p.alibi_slopes.data || p.q_segments.data ||
           p.prefix_lens.data || p.leftpad_k.data;
}

// tanh(x) = 1 - 2 / (1 + e^2x), to about 1e-7.
FASTATTN_DEVICE float tanh_by_exp2(float x) { return 1.f - 2.f / (1.f + exp2_approx(x * 2.885390081777927f)); }

// Row i of head h of batch entry b.
struct EntryRow {
    int64_t b, h;
    int i;

    // Whether key j, which the window shows or not, is visible as far as the bias has no say.
    FASTATTN_DEVICE bool sees(const AttentionParams& p, const Band& band, bool in_window, int j) const {
        if (p.prefix_lens.data) in_window = in_window || (j < look_up(p.prefix_lens, b) && j < band.seqlen_k);
        if (!in_window) return false;
        if (p.leftpad_k.data && j < look_up(p.leftpad_k, b)) return false;
        if (p.q_segments.data && look_up(p.q_segments, b, i) != look_up(p.k_segments, b, j)) return false;
        return !p.mask.data ||
               load_global(static_cast<const bool*>(p.mask.data) + b * p.mask.stride[0] + h * p.mask.stride[1] +
                           i * p.mask.stride[2] + j * p.mask.stride[3]);
    }

    // The scaled score of a key that is seen, capped, with its bias; -inf where the bias hides it.
    FASTATTN_DEVICE float score(const AttentionParams& p, const Band& band, float scaled, int j) const {
        if (p.softcap != 0.) scaled = cap(p) * tanh_by_exp2(scaled / cap(p));
        if (p.alibi_slopes.data) {
            const int64_t distance = i + band.offset - j;
            scaled -= look_up(p.alibi_slopes, b, h) * static_cast<float>(distance < 0 ? -distance : distance);
        }
        if (!p.bias.data) return scaled;
        const float bias = read_bias(p, b * p.bias.stride[0] + h * p.bias.stride[1] + i * p.bias.stride[2] +
                                            j * p.bias.stride[3]);
        return bias == -INFINITY ? bias : scaled + bias;
    }

    // The derivative of the capped score.
    static FASTATTN_DEVICE float cap_slope(const AttentionParams& p, float scaled) {
        const float capped = tanh_by_exp2(scaled / cap(p));
        return 1.f - capped * capped;
    }

private:
    static FASTATTN_DEVICE float cap(const AttentionParams& p) { return static_cast<float>(p.softcap); }

    static FASTATTN_DEVICE float read_bias(const AttentionParams& p, int64_t at) {
        switch (p.bias_dtype) {
            case DType::kFloat16:
                return to_float(load_global(&static_cast<const Half*>(p.bias.data)[at]));
            case DType::kBFloat16:
                return to_float(load_global(&static_cast<const BFloat16*>(p.bias.data)[at]));
            default:
                return load_global(&static_cast<const float*>(p.bias.data)[at]);
        }
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

// The random words of keys j / 4 * 4 .. + 3 for query i; word j % 4 drops key j iff it is below the threshold.
FASTATTN_DEVICE Philox4 dropout_words(const AttentionParams& p, int64_t b, int64_t h, int i, int j) {
    const uint64_t seed = static_cast<uint64_t>(load_global(p.dropout_seed));
    const uint64_t bh = static_cast<uint64_t>(b * p.heads_q + h);
    const Philox4 counter = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(bh),
                             static_cast<uint32_t>(bh >> 32)};
    return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace fastattn::cuda::sm80
