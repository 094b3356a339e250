// What the backward kernels share: the workspace, and P and dS of an entry.
//
//     P = exp(S - lse);  dP = dO V^T;  dS = P * (D * dP - delta);  delta = rowsum(dO * O) - dlse;  D: dropout's factors
//     dV = (D * P)^T dO;  dK = softmax_scale dS^T Q;  dQ = softmax_scale dS K
#pragma once

#include <cmath>

#include "cuda/band.h"
#include "cuda/ptx/arithmetic.h"
#include "cuda/sm80/entries.h"
#include "cuda/sm80/fragment.h"
#include "cuda/sm80/load.h"
#include "cuda/sm80/tiles.h"

namespace fastattn::cuda::sm80 {

constexpr float kLog2E = 1.4426950408889634f;

// The workspace, in floats: delta and lse, each (batch, heads_q, seqlen_q), then, unless deterministic, the sums of dQ,
// (batch, heads_q, seqlen_q, head_dim_qk). Here lse is +inf for a query that sees nothing or does not exist: P = 0.
FASTATTN_DEVICE int64_t all_rows(const AttentionParams& p) { return p.batch * p.heads_q * p.seqlen_q; }
FASTATTN_DEVICE int64_t row_index(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
    return (b * p.heads_q + h) * p.seqlen_q + i;
}
FASTATTN_DEVICE float* delta_rows(const AttentionParams& p) { return static_cast<float*>(p.workspace); }
FASTATTN_DEVICE float* lse_rows(const AttentionParams& p) { return delta_rows(p) + all_rows(p); }
FASTATTN_DEVICE float* dq_sums(const AttentionParams& p) { return lse_rows(p) + all_rows(p); }

// s becomes D * P, and dp dS, times the derivative of the softcap; both kInvisible where the entry is invisible.
template <bool kGeneral>
struct EntryGradient {
    const AttentionParams& p;
    const Band& band;
    float scale, unit;  // softmax_scale, times log2(e)

    FASTATTN_DEVICE EntryGradient(const AttentionParams& p, const Band& band)
        : p(p), band(band), scale(static_cast<float>(p.softmax_scale)), unit(scale * kLog2E) {}

    FASTATTN_DEVICE void operator()(float& s, float& dp, bool in_window, float lse, float delta, int64_t b, int64_t h,
                                    int i, int j) const {
        bool visible = in_window;
        float weight, kept = 1.f, slope = 1.f;
        if (kGeneral) {
            float score = s * scale;
            if (by_entry(p)) {
                const EntryRow entries = {b, h, i};
                visible = i < band.seqlen_q && entries.sees(p, band, in_window, j);
                if (visible && p.softcap != 0.) slope = EntryRow::cap_slope(p, score);
                if (visible) score = entries.score(p, band, score, j);
                visible = visible && score != -INFINITY;
            }
            weight = exp2_approx((score - lse) * kLog2E);
            if (p.dropout_threshold && visible) {
                const Philox4 random = dropout_words(p, b, h, i, j);
                const uint32_t low = j & 1 ? random.word[1] : random.word[0];
                const uint32_t high = j & 1 ? random.word[3] : random.word[2];
                kept = (j & 2 ? high : low) < p.dropout_threshold ? 0.f : static_cast<float>(p.dropout_scale);
                if (kept == 0.f) dp = 0.f;
            }
        } else {
            weight = exp2_approx(fmaf(s, unit, -lse * kLog2E));
        }
        s = visible ? weight * kept : kInvisible;
        dp = visible ? fmaf(weight * slope, fmaf(dp, kept, -delta), 0.f) : kInvisible;  // + 0: -0 becomes 0
    }
};

// The sum of the products of two pairs of elements.
template <typename T>
FASTATTN_DEVICE float dot(uint32_t x, uint32_t y) {
    const Float2 a = unpack<T>(x), b = unpack<T>(y);
    return a.x * b.x + a.y * b.y;
}

// Two neighbouring elements of a row, where they exist.
template <typename T>
FASTATTN_DEVICE void store_pair(const Matrix<T>& to, int row, int col, float low, float high) {
    if (row >= to.rows || col >= to.cols) return;
    T* at = to.data + row * to.row_stride + col * to.col_stride;
    if (to.col_stride == 1 && col + 1 < to.cols && reinterpret_cast<uintptr_t>(at) % 4 == 0) {
        store_global(reinterpret_cast<uint32_t*>(at), pack<T>(low, high));
        return;
    }
    T element;
    from_float(low, element);
    store_global(at, element);
    if (col + 1 >= to.cols) return;
    from_float(high, element);
    store_global(at + to.col_stride, element);
}

}  // namespace fastattn::cuda::sm80
