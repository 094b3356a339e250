// What the backward kernels share: the workspace, and P and dS of an entry.
//
//     P = exp(S - lse);  dP = dO V^T;  dS = P * (D * dP - delta);  delta = rowsum(dO * O) - dlse;  D: dropout's factors
//     dV = (D * P)^T dO;  dK = softmax_scale dS^T Q;  dQ = softmax_scale dS K
#pragma once

#include <cmath>

#include "cuda/band.h"
#include "cuda/entries.h"
#include "cuda/ptx/arithmetic.h"
#include "cuda/sm80/fragment.h"
#include "cuda/sm80/load.h"
#include "cuda/sm80/tiles.h"

namespace fastattn::cuda::sm80 {

constexpr float kLog2E = 1.4426950408889634f;

// The workspace, in floats: delta and lse, each (batches_q, heads_q, rows_q), then, unless deterministic, the sums of
// dQ, (batches_q, heads_q, rows_q, head_dim_qk). Here lse is +inf for a query that sees nothing or does not exist: P =
// 0.
FASTATTN_DEVICE float* delta_rows(const AttentionParams& p) { return static_cast<float*>(p.workspace); }
FASTATTN_DEVICE float* lse_rows(const AttentionParams& p) { return delta_rows(p) + all_rows(p); }
FASTATTN_DEVICE float* dq_sums(const AttentionParams& p) { return lse_rows(p) + all_rows(p); }

// Of an entry: s becomes D * P, and dp dS, times the derivative of the softcap; both kInvisible where it is invisible.
template <bool kGeneral>
struct EntryGradient;
template <>
struct EntryGradient<false> {
    float unit;  // softmax_scale log2(e)

    FASTATTN_DEVICE EntryGradient(const AttentionParams& p, const Band&, int)
        : unit(static_cast<float>(p.softmax_scale) * kLog2E) {}

    FASTATTN_DEVICE void operator()(float& s, float& dp, bool visible, float lse, float delta) const {
        const float weight = exp2_approx(fmaf(s, unit, -lse * kLog2E));
        s = visible ? weight : kInvisible;
        dp = visible ? fmaf(weight, dp - delta, 0.f) : kInvisible;  // + 0: -0 becomes 0
    }
};
template <>
struct EntryGradient<true> {
    EntryRules rules;
    float scale, dropout_scale;

    FASTATTN_DEVICE EntryGradient(const AttentionParams& p, const Band& band, int b)
        : rules(p, band, b),
          scale(static_cast<float>(p.softmax_scale)),
          dropout_scale(static_cast<float>(p.dropout_scale)) {}

    // What dropout multiplies the weight with; words: those of the key's four.
    FASTATTN_DEVICE float kept(const Philox4& words, int j) const {
        return rules.p.dropout_threshold == 0 ? 1.f : drops(rules.p, words, j) ? 0.f : dropout_scale;
    }
    FASTATTN_DEVICE Philox4 words(int h, int i, int j) const {
        return rules.p.dropout_threshold == 0 ? Philox4{} : dropout_words(rules.p, rules.b, h, i, j);
    }

    FASTATTN_DEVICE void operator()(float& s, float& dp, const EntryRules::Row& row, int j, float kept, float lse,
                                    float delta) const {
        float slope, score = rules.capped(s * scale, slope);
        bool visible = rules.sees(row, j);
        if (visible) score = rules.biased(row, score, j);
        visible = visible && score != -INFINITY;
        const float weight = exp2_approx((score - lse) * kLog2E);
        if (kept == 0.f) dp = 0.f;
        s = visible ? weight * kept : kInvisible;
        dp = visible ? fmaf(weight * slope, fmaf(dp, kept, -delta), 0.f) : kInvisible;
    }
};

// The sum of the products of two pairs of elements.
template <typename T>
FASTATTN_DEVICE float dot(uint32_t x, uint32_t y) {
    const Float2 a = unpack<T>(x), b = unpack<T>(y);
    return a.x * b.x + a.y * b.y;
}

// acc, times a factor, to rows row0 + fragment_row of a matrix and columns col(n) + fragment_col, where they exist.
template <typename T, int kN, typename Columns>
FASTATTN_DEVICE void store_rows(const Matrix<T>& to, int row0, const float (&acc)[kN][4], float factor,
                                const Columns& column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + fragment_row(2 * half);
        if (row >= to.rows) continue;
        T* data = to.data + row * to.row_stride;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            store_pair(data, to.col_stride, to.cols, column(n) + fragment_col(0), acc[n][2 * half] * factor,
                       acc[n][2 * half + 1] * factor);
        }
    }
}

}  // namespace fastattn::cuda::sm80
