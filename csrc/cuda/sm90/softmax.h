// The online softmax of a lane's two rows of a warpgroup's scores, apart from the rescaling of the output, which waits
// until the product that is in flight has arrived. The formulas: cuda/online_softmax.h.
#pragma once

#include <cmath>

#include "cuda/online_softmax.h"
#include "cuda/sm90/contain.h"

namespace fastattn::cuda::sm90 {

// Weights are 2^kExponent times what they are to be; so is their sum.
template <int kExponent>
struct ScaledRowSoftmax {
    float max[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};  // of this lane's columns until finish()
    float unit;                 // softmax_scale log2(e), positive

    FASTATTN_DEVICE explicit ScaledRowSoftmax(float unit) : unit(unit) {}

    // Scores become weights; shrink is what earlier output is to be multiplied with. kMasked: a row may be all -inf.
    template <bool kMasked, int kCount>
    FASTATTN_DEVICE void weigh(float (&s)[kCount], float (&shrink)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float row_max = max[half];
#pragma unroll
            for (int n = 2 * half; n < kCount; n += 4) row_max = fmaxf(row_max, fmaxf(s[n], s[n + 1]));
            row_max = quad_max(row_max);
            const float pivot = kMasked && row_max == -INFINITY ? 0.f : row_max;  // -inf - -inf would be NaN
            shrink[half] = exp2_approx((max[half] - pivot) * unit);
            max[half] = row_max;
            const float scaled_pivot = pivot * unit - kExponent;
            float row_sum = 0.f;
#pragma unroll
            for (int n = 2 * half; n < kCount; n += 4) {
#pragma unroll
                for (int e = n; e < n + 2; ++e) {
                    s[e] = exp2_approx(fmaf(s[e], unit, -scaled_pivot));
                    row_sum += s[e];
                }
            }
            sum[half] = fmaf(sum[half], shrink[half], row_sum);
        }
    }

    FASTATTN_DEVICE void finish() { sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]); }
    // What the output is to be multiplied with, and the natural log-sum-exp; 0 and -inf for a row that saw nothing.
    FASTATTN_DEVICE float normalizer(int half) const { return sum[half] == 0.f ? 0.f : 1.f / sum[half]; }
    FASTATTN_DEVICE float lse(int half) const {
        if (sum[half] == 0.f) return -INFINITY;
        return fmaf(max[half], unit * kLn2, (log2_approx(sum[half]) - kExponent) * kLn2);
    }
};
using RowSoftmax = ScaledRowSoftmax<0>;

}  // namespace fastattn::cuda::sm90
