// Products of few bfloat16 rows with a block of keys and values by vdpbf16ps, which adds the products of two
// neighbouring elements to each of 16 floats: no conversion to float, and twice the rate of float multiply-adds (Zen
// 4).
#pragma once

#include "few_rows.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// 16 pairs of neighbouring elements.
template <>
struct Step<float, BFloat16> {
    static constexpr int kElements = 32;
    static __m512i load_from(const BFloat16* from) { return _mm512_loadu_si512(from); }
    static Vector<float> add(Vector<float> sum, __m512i a, __m512i b) {
        return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};

template <>
struct FewRowsByTiles<BFloat16> {
    using R = FewRows<BFloat16, float>;
    using By = Step<float, BFloat16>;
    struct Session {};
    static constexpr bool kExist = true;
    static constexpr int64_t kBlock = R::kBlock;

    static bool suit(const AttentionParams& p) {
        return p.head_dim_qk % 32 == 0 && p.head_dim_v % 32 == 0 && p.k.stride[3] == 1 && p.v.stride[3] == 1;
    }

    // n rows of dim elements, and after them, where there are more than 2, rows of 0 up to a multiple of 4.
    void start(int64_t n, const float* q, int64_t dim) {
        rows_ = n <= 2 ? n : round_up(n, 4);
        BFloat16* to = q_.reserve(R::kMaxRows * dim);
        for (int64_t i = 0; i < rows_ * dim; ++i) narrow(i < n * dim ? q[i] : 0.0f, to[i]);  // exact: q was bfloat16
    }

    // s[r][c] = q_r · k_c.
    void products(const BFloat16* const* k, int64_t, int64_t dim, float* s) const {
        R::products(rows_, q_.get(), k, dim, s);
    }

    // out_r += sum over c of s[r][c] v_c, weights rounded to bfloat16.
    void add_values(int64_t n, const float* s, const BFloat16* const* v, int64_t dim, float* out) {
        BFloat16* weights = weights_.reserve(R::kMaxRows * kBlock);
        for (int64_t i = 0; i < n * kBlock; i += 16) store_narrow<float>(weights + i, load<float>(s + i));
        std::fill(weights + n * kBlock, weights + rows_ * kBlock, BFloat16{0});
        float* sums = sums_.reserve(R::kMaxRows * dim);
        int64_t r = 0;
        for (; r + 8 <= rows_; r += 8) add_rows<8>(weights + r * kBlock, v, dim, sums + r * dim);
        for (; r + 4 <= rows_; r += 4) add_rows<4>(weights + r * kBlock, v, dim, sums + r * dim);
        if (r + 2 == rows_) add_rows<2>(weights + r * kBlock, v, dim, sums + r * dim);
        if (r + 1 == rows_) add_rows<1>(weights + r * kBlock, v, dim, sums + r * dim);
        for (r = 0; r < n; ++r) {
            const float* row = sums + r * dim;
            Vector<float> zero{};
            for (int64_t d = 0; d < dim; d += 16) zero += load<float>(row + d) - load<float>(row + d);
            if (sum_of<float>(zero) != 0) {  // inf or NaN: what is unseen must not be felt
                R::add_values(1, s + r * kBlock, v, kBlock, dim, out + r * dim);
                continue;
            }
            float* to = out + r * dim;
            for (int64_t d = 0; d < dim; d += 16) store<float>(to + d, load<float>(to + d) + load<float>(row + d));
        }
    }

private:
    // Neighbouring keys are joined in pairs: those of 32 dims are two vectors, dims 0-3, 8-11, ... and 4-7, 12-15, ...
    template <int kRows>
    static void add_rows(const BFloat16* weights, const BFloat16* const* v, int64_t dim, float* sums) {
        constexpr int kVectors = std::min(4, 8 / kRows);  // of 32 dims
        int64_t d = 0;
        for (; d + kVectors * 32 <= dim; d += kVectors * 32) add_columns<kRows, kVectors>(weights, v, d, dim, sums + d);
        for (; d < dim; d += 32) add_columns<kRows, 1>(weights, v, d, dim, sums + d);
    }
    template <int kRows, int kVectors>
    __attribute__((noinline)) static void add_columns(const BFloat16* weights, const BFloat16* const* v, int64_t d,
                                                      int64_t dim, float* sums) {
        Vector<float> sum[kRows][kVectors][2] = {};
        for (int64_t c = 0; c < kBlock; c += 2) {
            R::fetch(v[c + kBlock] + d, kVectors * 32);
            R::fetch(v[c + 1 + kBlock] + d, kVectors * 32);
            __m512i low[kVectors], high[kVectors];
#pragma GCC unroll 4
            for (int u = 0; u < kVectors; ++u) {
                const __m512i a = By::load_from(v[c] + d + u * 32), b = By::load_from(v[c + 1] + d + u * 32);
                low[u] = _mm512_unpacklo_epi16(a, b), high[u] = _mm512_unpackhi_epi16(a, b);
            }
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                int32_t pair;
                std::memcpy(&pair, weights + r * kBlock + c, sizeof pair);
                const __m512i left = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int u = 0; u < kVectors; ++u) {
                    sum[r][u][0] = By::add(sum[r][u][0], left, low[u]);
                    sum[r][u][1] = By::add(sum[r][u][1], left, high[u]);
                }
            }
        }
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int r = 0; r < kRows; ++r) {
            for (int u = 0; u < kVectors; ++u) {
                const __m512 low = (__m512)sum[r][u][0], high = (__m512)sum[r][u][1];
                float* to = sums + r * dim + u * 32;
                _mm512_storeu_ps(to, _mm512_permutex2var_ps(low, first, high));
                _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low, second, high));
            }
        }
    }

    Buffer<BFloat16> q_, weights_;
    Buffer<float> sums_;
    int64_t rows_ = 0;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
