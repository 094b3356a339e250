// What happens to a row of raw products q·k on its way to a softmax: scale, bias, visibility, dropout.
#pragma once

#include <algorithm>

#include "pack.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// The scores of a call, t = scale · q·k + bias, and who sees whom. log2(e) is not folded into the scale: it would
// save nothing here, rounds large scores worse, and overflows beside a bias of finfo.min.
template <typename C>
struct Scores {
    const AttentionParams& p;
    const C scale;

    explicit Scores(const AttentionParams& params) : p(params), scale(static_cast<C>(params.softmax_scale)) {}

    bool restricted() const {
        return p.mask.data != nullptr || p.bias.data != nullptr || p.left < p.seqlen_q + p.seqlen_k ||
               p.right < p.seqlen_q + p.seqlen_k;
    }

    // Keys [low, high) that the window leaves to query i; queries that it leaves to key j.
    int64_t key_low(int64_t i) const { return std::max<int64_t>(0, i + p.offset - p.left); }
    int64_t key_high(int64_t i) const { return std::min(p.seqlen_k, i + p.offset + p.right + 1); }
    int64_t query_low(int64_t j) const { return std::max<int64_t>(0, j - p.offset - p.right); }
    int64_t query_high(int64_t j) const { return std::min(p.seqlen_q, j - p.offset + p.left + 1); }

    // One row of a score tile in place: t for columns [first, last) of the row, -inf outside [low, high) and where
    // the mask is false. When rows are queries the columns are keys; otherwise (transposed) rows are keys.
    // s points at column `first`.
    template <bool transposed>
    void finish_row(C* s, int64_t b, int64_t h, int64_t row, int64_t first, int64_t last, int64_t low,
                    int64_t high) const {
        low = std::clamp(low, first, last), high = std::clamp(high, low, last);
        for (int64_t c = first; c < low; ++c) s[c - first] = -kInfinity<C>;
        for (int64_t c = high; c < last; ++c) s[c - first] = -kInfinity<C>;
        s += low - first;
        const int64_t n = high - low;
        if (p.bias.data == nullptr) {
            for (int64_t c = 0; c < n; ++c) s[c] *= scale;
        } else {
            switch (p.bias_dtype) {
                case DType::kFloat16:
                    add_bias<Half, transposed>(s, b, h, row, low, n);
                    break;
                case DType::kBFloat16:
                    add_bias<BFloat16, transposed>(s, b, h, row, low, n);
                    break;
                case DType::kFloat32:
                    add_bias<float, transposed>(s, b, h, row, low, n);
                    break;
                case DType::kFloat64:
                    add_bias<double, transposed>(s, b, h, row, low, n);
                    break;
            }
        }
        if (p.mask.data != nullptr) {
            const int64_t step = p.mask.stride[transposed ? 2 : 3];
            const uint8_t* visible = element<uint8_t, transposed>(p.mask, b, h, row, low);
            if (step == 1) {
                for (int64_t c = 0; c < n; ++c) s[c] = visible[c] ? s[c] : -kInfinity<C>;
            } else if (step == 0) {
                if (n > 0 && !*visible) std::fill(s, s + n, -kInfinity<C>);
            } else {
                for (int64_t c = 0; c < n; ++c) s[c] = visible[c * step] ? s[c] : -kInfinity<C>;
            }
        }
    }

    template <typename B, bool transposed>
    static const B* element(const Tensor4& x, int64_t b, int64_t h, int64_t row, int64_t column) {
        return static_cast<const B*>(x.data) + b * x.stride[0] + h * x.stride[1] +
               (transposed ? column : row) * x.stride[2] + (transposed ? row : column) * x.stride[3];
    }

    template <typename B, bool transposed>
    void add_bias(C* s, int64_t b, int64_t h, int64_t row, int64_t low, int64_t n) const {
        const int64_t step = p.bias.stride[transposed ? 2 : 3];
        const B* bias = element<B, transposed>(p.bias, b, h, row, low);
        for (int64_t c = 0; c < n; ++c) {
            const C add = static_cast<C>(widen(bias[c * step]));
            // The product of an unseen NaN key must not outlive a bias of -inf.
            s[c] = add == -kInfinity<C> ? add : s[c] * scale + add;
        }
    }
};

// Philox4x32-10 (Salmon et al., SC 2011).
struct Philox {
    uint32_t word[4];

    Philox(uint64_t seed, uint64_t j4, uint64_t i, uint64_t bh)
        : word{static_cast<uint32_t>(j4), static_cast<uint32_t>(i), static_cast<uint32_t>(bh),
               static_cast<uint32_t>(bh >> 32)} {
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = 0xD2511F53ull * word[0], p1 = 0xCD9E8D57ull * word[2];
            const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ word[1] ^ k0;
            const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ word[3] ^ k1;
            word[0] = n0, word[1] = static_cast<uint32_t>(p1), word[2] = n2, word[3] = static_cast<uint32_t>(p0);
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
    }
};

// keep[i - i0][j - j0] for a tile, 1 = kept.
inline void dropout_tile(const AttentionParams& p, int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                         uint8_t* keep, int64_t stride) {
    const uint64_t seed = static_cast<uint64_t>(*p.dropout_seed);
    const uint64_t bh = static_cast<uint64_t>(b * p.heads_q + h);
    for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j4 = j0 / 4; j4 * 4 < j1; ++j4) {
            const Philox random(seed, static_cast<uint64_t>(j4), static_cast<uint64_t>(i), bh);
            for (int64_t j = std::max(j0, j4 * 4); j < std::min(j1, j4 * 4 + 4); ++j) {
                keep[(i - i0) * stride + (j - j0)] = random.word[j % 4] >= p.dropout_threshold;
            }
        }
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
