// The online softmax of the rows that a lane of mma.m16n8k16 holds: two of each block of 16.
//
// With scores s in units where a weight is 2^(unit (s - max)):
//     m' = max(m, rowmax s);  shrink = 2^(unit (m - m'));  l = l shrink + rowsum p;  O = O shrink + P V
// Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022.
#pragma once

#include <cmath>

#include "cuda/ptx/arithmetic.h"
#include "cuda/ptx/shuffle.h"

namespace fastattn::cuda {

// Over the four lanes that share a row.
FASTATTN_DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
FASTATTN_DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

template <int kM>
struct OnlineSoftmax {
    static constexpr float kLn2 = 0.6931471805599453f;

    float max[kM][2];  // of scores, -inf: nothing seen
    float sum[kM][2];  // of weights, this lane's columns only until finish()
    float unit;        // positive

    FASTATTN_DEVICE explicit OnlineSoftmax(float unit) : unit(unit) { reset(); }

    FASTATTN_DEVICE void reset() {
#pragma unroll
        for (int m = 0; m < kM; ++m) max[m][0] = max[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.f;
    }

    // Turns scores into weights and brings the accumulated output to the new maximum. kMasked: scores of -inf are
    // invisible and become -0, which no visible weight is. kSubtractFirst: unit * s may overflow where unit * (s - max)
    // does not, as with a bias of finfo.min.
    template <bool kMasked, bool kSubtractFirst, int kN, int kNOut>
    FASTATTN_DEVICE void update(float (&s)[kM][kN][4], float (&out)[kM][kNOut][4]) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float row_max = max[m][half];
#pragma unroll
                for (int n = 0; n < kN; ++n) row_max = fmaxf(row_max, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                row_max = quad_max(row_max);
                const float pivot = kMasked && row_max == -INFINITY ? 0.f : row_max;  // -inf - -inf would be NaN
                const float shrink = exp2_approx((max[m][half] - pivot) * unit);
                max[m][half] = row_max;
                const float scaled_pivot = pivot * unit;
                float row_sum = 0.f;
#pragma unroll
                for (int n = 0; n < kN; ++n) {
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        const float score = s[m][n][e];
                        float weight =
                            exp2_approx(kSubtractFirst ? (score - pivot) * unit : fmaf(score, unit, -scaled_pivot));
                        row_sum += weight;
                        if (kMasked && score == -INFINITY) weight = -0.f;
                        s[m][n][e] = weight;
                    }
                }
                sum[m][half] = fmaf(sum[m][half], shrink, row_sum);
#pragma unroll
                for (int n = 0; n < kNOut; ++n) out[m][n][2 * half] *= shrink, out[m][n][2 * half + 1] *= shrink;
            }
        }
    }

    FASTATTN_DEVICE void finish() {
#pragma unroll
        for (int m = 0; m < kM; ++m) sum[m][0] = quad_sum(sum[m][0]), sum[m][1] = quad_sum(sum[m][1]);
    }
    // What the output is to be multiplied with, and the natural log-sum-exp; 0 and -inf for a row that saw nothing.
    FASTATTN_DEVICE float normalizer(int m, int half) const { return sum[m][half] == 0.f ? 0.f : 1.f / sum[m][half]; }
    FASTATTN_DEVICE float lse(int m, int half) const {
        return sum[m][half] == 0.f ? -INFINITY : fmaf(max[m][half], unit * kLn2, log2_approx(sum[m][half]) * kLn2);
    }
};

}  // namespace fastattn::cuda
