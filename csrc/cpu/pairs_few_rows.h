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
    static constexpr int64_t kBlock = R::kBlock, kPlaces = R::kPlaces;

    static bool suit(const AttentionParams& p) {
        return p.head_dim_qk % 32 == 0 && p.head_dim_v % 32 == 0 && p.k.stride[3] == 1 && p.v.stride[3] == 1;
    }

    // n rows of dim elements, and after them, where there are more than 2, rows of 0 up to a multiple of 4; eight of
    // them in the order in which `eight_products` reads them, the others as they lie.
    void start(int64_t n, const float* q, int64_t dim) {
        rows_ = n <= 2 ? n : round_up(n, 4);
        BFloat16 *rows = weights_.reserve(R::kMaxRows * dim), *to = q_.reserve(R::kMaxRows * dim);
        for (int64_t i = 0; i < n * dim; i += 16) store_narrow<float>(rows + i, load<float>(q + i));  // exact
        std::fill(rows + n * dim, rows + rows_ * dim, BFloat16{0});
        const int64_t eights = rows_ / 8 * 8 * dim;
        for (int64_t i = 0; i < eights; i += 8 * dim) {
            for (int64_t d = 0; d < dim; d += 4) {
                for (int64_t r = 0; r < 8; ++r, to += 4) std::memcpy(to, rows + i + r * dim + d, 4 * sizeof *to);
            }
        }
        std::copy(rows + eights, rows + rows_ * dim, to);
    }

    // s[r][c] = q_r · k_c.
    void products(const BFloat16* const* k, int64_t, int64_t keys, int64_t dim, float* s) const {
        if (rows_ < 4) return R::products(rows_, q_.get(), k, keys, dim, s);
        const int64_t place = keys / kPlaces, step = R::chunk(place, rows_ <= 8, dim);
        R::template for_groups<8, 4>(rows_, place, step, [&](auto rows, int64_t r, int64_t i, int64_t end) {
            const BFloat16* q = q_.get() + r * dim;
            if constexpr (rows == 8) {
                eight_products(q, k, place, i, end, dim, s + r * kBlock);
            } else {
                R::template products_of<4>(q, k, place, i, end, dim, s + r * kBlock);
            }
        });
    }

    // out_r += sum over c of s[r][c] v_c, weights rounded to bfloat16.
    void add_values(int64_t n, const float* s, const BFloat16* const* v, int64_t keys, int64_t dim, float* out) {
        BFloat16* weights = weights_.reserve(R::kMaxRows * kBlock);
        for (int64_t r = 0; r < rows_; ++r) {
            for (int64_t c = 0; c < keys; c += 32) {
                const float* from = s + r * kBlock + c;
                const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
                _mm512_storeu_si512(weights + r * kBlock + c, r < n ? (__m512i)pair : __m512i{});
            }
        }
        float* sums = sums_.reserve(R::kMaxRows * dim);
        const int64_t place = keys / kPlaces, step = R::chunk(place, rows_ <= 2 && dim == 128, dim);
        const auto add = [&](auto rows, int64_t r, int64_t i, int64_t end) {
            add_rows<rows>(weights + r * kBlock, v, place, i, end, dim, sums + r * dim);
        };
        rows_ > 4 ? R::template for_groups<4>(rows_, place, step, add)
                  : R::template for_groups<2, 1>(rows_, place, step, add);
        R::finish(n, s, v, place, step, dim, sums, out);
    }

private:
    // Eight rows by eight keys at a time, two neighbours from each of four places: two pairs of a key's elements, over
    // and over, by the same pairs of each row. So a key has one vector of sums, not eight.
    __attribute__((noinline)) static void eight_products(const BFloat16* q, const BFloat16* const* k, int64_t place,
                                                         int64_t i, int64_t end, int64_t dim, float* s) {
        constexpr int kKeys = 8, kRows = 8;
        for (; i < end; i += 2) {
            Vector<float> sum[kKeys] = {};
            const BFloat16 *row[kKeys], *next[kKeys];
            for (int x = 0; x < kKeys; ++x) {
                const int64_t c = x / 2 * place + i + x % 2;
                row[x] = k[c], next[x] = k[c + R::kAhead];
            }
            int64_t x_ahead = 0, d_ahead = 0;
            for (int64_t d = 0; d < dim; d += 32) {
#pragma GCC unroll 8
                for (int u = 0; u < 32; u += 4) {
                    R::fetch(next[x_ahead] + d_ahead, 32);
                    d_ahead += 32;
                    x_ahead += d_ahead == dim, d_ahead = d_ahead == dim ? 0 : d_ahead;
                    const __m512i left = By::load_from(q + (d + u) * kRows);
#pragma GCC unroll 8
                    for (int x = 0; x < kKeys; ++x) {
                        int64_t pairs;
                        std::memcpy(&pairs, row[x] + d + u, sizeof pairs);
                        sum[x] = By::add(sum[x], left, _mm512_set1_epi64(pairs));
                    }
                }
            }
            put_sums(sum, s + i, place);
            put_sums(sum + 4, s + i + 2 * place, place);
        }
    }
    // s[r][x / 2 * place + x % 2] = the sum of sum[x]'s lanes 2 r and 2 r + 1, for four keys x.
    static void put_sums(const Vector<float>* sum, float* s, int64_t place) {
        const auto even = [](__m512 x, __m512 y) { return _mm512_shuffle_ps(x, y, 0x88); };
        const auto odd = [](__m512 x, __m512 y) { return _mm512_shuffle_ps(x, y, 0xdd); };
        const auto both = [&](const Vector<float>* x) {
            return even((__m512)x[0], (__m512)x[1]) + odd((__m512)x[0], (__m512)x[1]);
        };
        const __m512 a = both(sum), b = both(sum + 2);
        const auto put = [&](__m512 x, float* to) {  // every other row, a quarter each
            const auto halves = [&](__m128 y, float* at) {
                _mm_storel_pi(reinterpret_cast<__m64*>(at), y);
                _mm_storeh_pi(reinterpret_cast<__m64*>(at + place), y);
            };
            halves(_mm512_castps512_ps128(x), to);
            halves(_mm512_extractf32x4_ps(x, 1), to + 2 * kBlock);
            halves(_mm512_extractf32x4_ps(x, 2), to + 4 * kBlock);
            halves(_mm512_extractf32x4_ps(x, 3), to + 6 * kBlock);
        };
        put(even(a, b), s);
        put(odd(a, b), s + kBlock);
    }

    // Neighbouring keys are joined in pairs: those of 32 dims are two vectors, dims 0-3, 8-11, ... and 4-7, 12-15, ...
    template <int kRows>
    static void add_rows(const BFloat16* weights, const BFloat16* const* v, int64_t place, int64_t i, int64_t end,
                         int64_t dim, float* sums) {
        constexpr int kVectors = std::min(4, 8 / kRows);  // of 32 dims
        int64_t d = 0;
        for (; d + kVectors * 32 <= dim; d += kVectors * 32)
            add_columns<kRows, kVectors>(weights, v, place, i, end, d, dim, sums + d);
        for (; d < dim; d += 32) add_columns<kRows, 1>(weights, v, place, i, end, d, dim, sums + d);
    }
    template <int kRows, int kVectors>
    __attribute__((noinline)) static void add_columns(const BFloat16* weights, const BFloat16* const* v, int64_t place,
                                                      int64_t i, int64_t end, int64_t d, int64_t dim, float* sums) {
        Vector<float> sum[kRows][kVectors][2] = {};
        const bool more = i > 0;
        const int64_t ahead = std::min(end - i, 2 * R::kAhead);
        for (; i < end; i += 2) {
            for (int64_t c = i; c < kPlaces * place; c += place) {
                R::fetch(v[c + ahead] + d, kVectors * 32);
                R::fetch(v[c + 1 + ahead] + d, kVectors * 32);
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
        }
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int u = 0; u < kVectors; ++u) {
                const __m512 low = (__m512)sum[r][u][0], high = (__m512)sum[r][u][1];
                float* to = sums + r * dim + u * 32;
                const Vector<float> a = (Vector<float>)_mm512_permutex2var_ps(low, first, high),
                                    b = (Vector<float>)_mm512_permutex2var_ps(low, second, high);
                store<float>(to, more ? load<float>(to) + a : a);
                store<float>(to + 16, more ? load<float>(to + 16) + b : b);
            }
        }
    }

    Buffer<BFloat16> q_, weights_;
    Buffer<float> sums_;
    int64_t rows_ = 0;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
