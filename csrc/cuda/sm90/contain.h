// Rows that became NaN or infinite, once more without tensor cores.
//
// wgmma forms 0 * x also for entries that the band makes invisible; where such an x is NaN or infinite, so is the sum.
// Here only visible entries are visited. It is slow, and for inputs that are broken somewhere. Keys and values behind
// the end of a sequence may be anything, and are no such inputs: the kernels clear them in shared memory. Queries
// behind the end, and their gradients, are of another sequence.
#pragma once

#include <cmath>

#include "cuda/band.h"
#include "cuda/ptx/arithmetic.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/shuffle.h"
#include "cuda/sm90/operand.h"

namespace fastattn::cuda::sm90 {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Query i, or key j, of head h of a sequence.
template <typename T>
FASTATTN_DEVICE const T* query_row(const Tensor4& x, const Band& band, int h, int i) {
    return static_cast<const T*>(x.data) + band.query_at(x, h) + i * x.stride[2];
}
template <typename T>
FASTATTN_DEVICE const T* key_row(const Tensor4& x, const Band& band, int h, int j) {
    return static_cast<const T*>(x.data) + band.key_at(x, h) + j * x.stride[2];
}

template <typename T>
FASTATTN_DEVICE float dot(const T* x, const T* y, int64_t size) {
    float sum = 0.f;
#pragma unroll 1
    for (int64_t d = 0; d < size; ++d) sum = fmaf(to_float(load_global(&x[d])), to_float(load_global(&y[d])), sum);
    return sum;
}

// kCols columns of a row, from `first` on, in the lanes of a warp: each has pairs of neighbouring ones, 64 apart.
template <int kCols>
struct RowSum {
    static constexpr int kPairs = (kCols + 63) / 64;
    int first = 0;
    float sum[kPairs][2] = {};

    static FASTATTN_DEVICE int column(int pair) { return 64 * pair + 2 * lane_index(); }

    template <typename T>
    FASTATTN_DEVICE void add(float weight, const T* row, int64_t cols) {
#pragma unroll
        for (int e = 0; e < 2 * kPairs; ++e) {
            const int col = first + column(e / 2) + e % 2;
            if (col < cols) sum[e / 2][e % 2] = fmaf(weight, to_float(load_global(&row[col])), sum[e / 2][e % 2]);
        }
    }
    // Into a row of a tile of these columns.
    template <typename T, int kRows>
    FASTATTN_DEVICE void write(uint32_t tile, int row, float scale) const {
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
            const int col = column(n);
            if (col >= kCols) continue;
            store_shared(Operand<kRows, kCols>::address(tile, row, col / 8) + col % 8 * 2,
                         pack<T>(scale * sum[n][0], scale * sum[n][1]));
        }
    }
};

// The output of query i, by one warp: out += sum over visible keys in [j_begin, j_end) of normalizer 2^(unit (q k -
// max)) v, with key(x, j) where key j lies in x.
template <typename T, int kCols, typename Key>
FASTATTN_DEVICE void redo_keys(const AttentionParams& p, const Band& band, int h, int i, int j_begin, int j_end,
                               float unit, float max, float normalizer, RowSum<kCols>& out, const Key& key) {
    const int end = min32(band.keys_end(i), j_end);
#pragma unroll 1
    for (int j0 = max32(band.keys_begin(i), j_begin); j0 < end; j0 += 32) {
        const int j = j0 + lane_index();
        float weight = 0.f;
        if (j < end) {
            const float score = dot(query_row<T>(p.q, band, h, i), key(p.k, j), p.head_dim_qk);
            weight = exp2_approx((score - max) * unit) * normalizer;
        }
#pragma unroll 1
        for (int n = 0; n < min32(end - j0, 32); ++n) {
            out.add(shuffle(weight, n), key(p.v, j0 + n), p.head_dim_v);
        }
    }
}

// delta and lse of each query, (batches_q, heads_q, rows_q) each; lse is +inf for a query that sees nothing.
FASTATTN_DEVICE const float* delta_rows(const AttentionParams& p) { return static_cast<const float*>(p.workspace); }
FASTATTN_DEVICE const float* lse_rows(const AttentionParams& p) { return delta_rows(p) + all_rows(p); }

// P and dS of one entry; lse and delta as sm80::prepare leaves them.
template <typename T>
struct EntryOf {
    float weight = 0.f, gradient = 0.f;

    FASTATTN_DEVICE EntryOf(const AttentionParams& p, const Band& band, int h, int hk, int i, int j, bool visible) {
        if (!visible) return;
        const int64_t row = band.row_index(p, h, i);
        const float lse = load_global(lse_rows(p) + row);
        const float score = dot(query_row<T>(p.q, band, h, i), key_row<T>(p.k, band, hk, j), p.head_dim_qk);
        const float dp = dot(query_row<T>(p.grad_out, band, h, i), key_row<T>(p.v, band, hk, j), p.head_dim_v);
        weight = exp2_approx(fmaf(score, static_cast<float>(p.softmax_scale), -lse) * kLog2E);
        gradient = weight * (dp - load_global(delta_rows(p) + row));
    }
};

// Key j's sums over the visible queries of head h, by one warp: dv += P dO, dk += dS Q.
template <typename T, int kKeyCols, int kValueCols>
FASTATTN_DEVICE void redo_key(const AttentionParams& p, const Band& band, int h, int hk, int j, RowSum<kKeyCols>& dk,
                              RowSum<kValueCols>& dv) {
    const int end = band.queries_end(j);
#pragma unroll 1
    for (int i0 = band.queries_begin(j); i0 < end; i0 += 32) {
        const EntryOf<T> entry(p, band, h, hk, i0 + lane_index(), j, i0 + lane_index() < end);
#pragma unroll 1
        for (int n = 0; n < min32(end - i0, 32); ++n) {
            dv.add(shuffle(entry.weight, n), query_row<T>(p.grad_out, band, h, i0 + n), p.head_dim_v);
            dk.add(shuffle(entry.gradient, n), query_row<T>(p.q, band, h, i0 + n), p.head_dim_qk);
        }
    }
}

// Query i's sum over the visible keys, by one warp: dq += dS K.
template <typename T, int kCols>
FASTATTN_DEVICE void redo_query_gradient(const AttentionParams& p, const Band& band, int h, int hk, int i,
                                         RowSum<kCols>& dq) {
    const int end = band.keys_end(i);
#pragma unroll 1
    for (int j0 = band.keys_begin(i); j0 < end; j0 += 32) {
        const EntryOf<T> entry(p, band, h, hk, i, j0 + lane_index(), j0 + lane_index() < end);
#pragma unroll 1
        for (int n = 0; n < min32(end - j0, 32); ++n) {
            dq.add(shuffle(entry.gradient, n), key_row<T>(p.k, band, hk, j0 + n), p.head_dim_qk);
        }
    }
}

}  // namespace fastattn::cuda::sm90
