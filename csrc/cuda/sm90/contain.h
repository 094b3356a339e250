// Rows whose output became NaN or infinite, once more without tensor cores.
//
// wgmma forms 0 * v also for keys that a query does not see; where such a v is NaN or infinite, so is the output. Here
// only visible keys are visited. It is slow, and for inputs that are broken somewhere.
#pragma once

#include <cmath>

#include "cuda/band.h"
#include "cuda/online_softmax.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/shared.h"
#include "cuda/sm90/operand.h"

namespace fastattn::cuda::sm90 {

template <typename T>
FASTATTN_DEVICE const T* row_of(const Tensor4& x, int b, int h, int row) {
    return static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1] + row * x.stride[2];
}

// The output of query i, by one warp, into row `row` of a tile: sum over visible keys of
// normalizer 2^(unit (q k - max)) v.
template <typename T, int kRows, int kCols>
FASTATTN_DEVICE void redo_row(const AttentionParams& p, const Band& band, uint32_t tile, int row, int b, int h, int hk,
                              int i, float unit, float max, float normalizer) {
    constexpr int kPairs = (kCols + 63) / 64;  // of neighbouring columns, for each lane
    const int head_dim_qk = static_cast<int>(p.head_dim_qk), head_dim_v = static_cast<int>(p.head_dim_v);
    const T* q = row_of<T>(p.q, b, h, i);
    float out[kPairs][2] = {};
    const int end = band.keys_end(i);
#pragma unroll 1
    for (int j0 = band.keys_begin(i); j0 < end; j0 += 32) {
        const int j = j0 + lane_index();
        float weight = 0.f;
        if (j < end) {
            const T* k = row_of<T>(p.k, b, hk, j);
            float score = 0.f;
#pragma unroll 1
            for (int d = 0; d < head_dim_qk; ++d) {
                score = fmaf(to_float(load_global(&q[d])), to_float(load_global(&k[d])), score);
            }
            weight = exp2_approx((score - max) * unit) * normalizer;
        }
#pragma unroll 1
        for (int n = 0; n < min32(end - j0, 32); ++n) {
            const float w = shuffle(weight, n);
            const T* v = row_of<T>(p.v, b, hk, j0 + n);
#pragma unroll
            for (int e = 0; e < 2 * kPairs; ++e) {
                const int col = 64 * (e / 2) + 2 * lane_index() + e % 2;
                if (col < head_dim_v) out[e / 2][e % 2] = fmaf(w, to_float(load_global(&v[col])), out[e / 2][e % 2]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
        const int col = 64 * n + 2 * lane_index();
        if (col >= kCols) continue;
        store_shared(Operand<kRows, kCols>::address(tile, row, col / 8) + col % 8 * 2, pack<T>(out[n][0], out[n][1]));
    }
}

}  // namespace fastattn::cuda::sm90
