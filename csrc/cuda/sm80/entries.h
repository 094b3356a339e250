// What the call says about single entries (i, j) of the score matrix: mask, bias, dropout.
#pragma once

#include "cuda/philox.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/global.h"
#include "params.h"

namespace fastattn::cuda::sm80 {

// Row i of head h of batch entry b.
struct EntryRow {
    const bool* mask;  // of key 0; null: none
    int64_t bias;      // offset of key 0

    static FASTATTN_DEVICE EntryRow of(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
        const bool* mask = static_cast<const bool*>(p.mask.data);
        return {mask ? mask + b * p.mask.stride[0] + h * p.mask.stride[1] + i * p.mask.stride[2] : nullptr,
                b * p.bias.stride[0] + h * p.bias.stride[1] + i * p.bias.stride[2]};
    }

    // The scaled score plus bias of key j; -inf where mask or bias hide it.
    FASTATTN_DEVICE float score(const AttentionParams& p, float scaled, int64_t j) const {
        if (mask && !load_global(&mask[j * p.mask.stride[3]])) return -INFINITY;
        if (!p.bias.data) return scaled;
        const float value = read_bias(p, bias + j * p.bias.stride[3]);
        return value == -INFINITY ? value : scaled + value;
    }

private:
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

// The random words of keys j / 4 * 4 .. + 3 for query i; word j % 4 drops key j iff it is below the threshold.
FASTATTN_DEVICE Philox4 dropout_words(const AttentionParams& p, int64_t b, int64_t h, int i, int j) {
    const uint64_t seed = static_cast<uint64_t>(load_global(p.dropout_seed));
    const uint64_t bh = static_cast<uint64_t>(b * p.heads_q + h);
    const Philox4 counter = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(bh),
                             static_cast<uint32_t>(bh >> 32)};
    return philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace fastattn::cuda::sm80
