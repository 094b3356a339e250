// What happens to a row of raw products q·k on its way to a softmax: scale, bias, visibility, dropout.
#pragma once

#include <algorithm>

#include "pack.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

constexpr int64_t kMaxTileColumns = 512;

// One batch entry: its lengths, and who sees whom.
struct Entry {
    int64_t b;
    int64_t seqlen_q, seqlen_k;
    int64_t left, right, offset;

    Entry(const AttentionParams& p, int64_t b_)
        : b(b_), seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k), left(p.left), right(p.right), offset(p.offset) {}

    // Keys [low, high) that the window leaves to query i; queries that it leaves to key j. All four grow with i or j.
    int64_t key_low(int64_t i) const { return std::max<int64_t>(0, i + offset - left); }
    int64_t key_high(int64_t i) const { return std::min(seqlen_k, i + offset + right + 1); }
    int64_t query_low(int64_t j) const { return std::max<int64_t>(0, j - offset - right); }
    int64_t query_high(int64_t j) const { return std::min(seqlen_q, j - offset + left + 1); }
};

// Columns [first, last) of a tile that some row of it sees; whole: every row sees them all.
struct Span {
    int64_t first, last;
    bool whole;
    bool empty() const { return first >= last; }
};

// The scores of a call, t = scale · q·k + bias. log2(e) is not folded into the scale: it would save nothing here,
// rounds large scores worse, and overflows beside a bias of finfo.min.
template <typename C>
struct Scores {
    const AttentionParams& p;
    const C scale;

    explicit Scores(const AttentionParams& params) : p(params), scale(static_cast<C>(params.softmax_scale)) {}

    // Whether t is scale · q·k with a positive scale, so that the largest product gives the largest score.
    bool plain() const { return p.bias.data == nullptr && scale > 0; }

    bool restricted() const {
        return p.mask.data != nullptr || p.bias.data != nullptr || p.left < p.seqlen_q + p.seqlen_k ||
               p.right < p.seqlen_q + p.seqlen_k;
    }

    // The columns of a tile that rows [row, row + rows) see, by window and mask, widened to multiples of unit.
    // When rows are queries the columns are keys; otherwise (transposed) rows are keys.
    template <bool transposed>
    Span span(const Entry& e, int64_t h, int64_t row, int64_t rows, int64_t first, int64_t last, int64_t unit) const {
        const int64_t bottom = row + rows - 1;
        int64_t low = transposed ? e.query_low(row) : e.key_low(row);
        int64_t high = transposed ? e.query_high(bottom) : e.key_high(bottom);
        low = std::max(low, first), high = std::min(high, last);
        if (low >= high) return {0, 0, false};
        bool whole = (transposed ? e.query_low(bottom) : e.key_low(bottom)) <= low &&
                     (transposed ? e.query_high(row) : e.key_high(row)) >= high;
        if (p.mask.data != nullptr) whole &= trim_by_mask<transposed>(e, h, row, rows, low, high);
        if (low >= high) return {0, 0, false};
        const int64_t from = (low - first) / unit * unit, to = round_up(high - first, unit);
        return {from, to, whole && from == low - first && to == high - first};
    }

    // Narrows [low, high) to what some row sees by the mask; returns whether all of them see all of it.
    template <bool transposed>
    bool trim_by_mask(const Entry& e, int64_t h, int64_t row, int64_t rows, int64_t& low, int64_t& high) const {
        const int64_t row_step = p.mask.stride[transposed ? 3 : 2], step = p.mask.stride[transposed ? 2 : 3];
        if (row_step == 0) rows = 1;
        const int64_t n = step == 0 ? 1 : high - low;
        uint8_t any[kMaxTileColumns] = {}, all = 1;
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* visible = element<uint8_t, transposed>(p.mask, e.b, h, row + r, low);
            if (step == 1) {
                for (int64_t c = 0; c < n; ++c) any[c] |= visible[c], all &= visible[c];
            } else {
                for (int64_t c = 0; c < n; ++c) any[c] |= visible[c * step], all &= visible[c * step];
            }
        }
        if (all) return true;
        int64_t from = 0, to = n;
        while (from < to && !any[from]) ++from;
        while (from < to && !any[to - 1]) --to;
        if (from == to) {
            high = low;
        } else if (step != 0) {
            high = low + to, low += from;
        }
        all = 1;
        if (step != 0 && rows == 1) {
            for (int64_t c = from; c < to; ++c) all &= any[c];
            return all;
        }
        return false;
    }

    // One row of a score tile in place: t for columns [first, last) of the row, -inf where the window or the mask
    // hides them. s points at column `first`.
    template <bool transposed>
    void finish_row(C* s, const Entry& e, int64_t h, int64_t row, int64_t first, int64_t last) const {
        const int64_t b = e.b;
        int64_t low = transposed ? e.query_low(row) : e.key_low(row);
        int64_t high = transposed ? e.query_high(row) : e.key_high(row);
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

// The same, transposed: keep[j - j0][i - i0].
inline void dropout_tile_transposed(const AttentionParams& p, int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t j0,
                                    int64_t j1, uint8_t* keep, int64_t stride) {
    const uint64_t seed = static_cast<uint64_t>(*p.dropout_seed);
    const uint64_t bh = static_cast<uint64_t>(b * p.heads_q + h);
    for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j4 = j0 / 4; j4 * 4 < j1; ++j4) {
            const Philox random(seed, static_cast<uint64_t>(j4), static_cast<uint64_t>(i), bh);
            for (int64_t j = std::max(j0, j4 * 4); j < std::min(j1, j4 * 4 + 4); ++j) {
                keep[(j - j0) * stride + (i - i0)] = random.word[j % 4] >= p.dropout_threshold;
            }
        }
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
