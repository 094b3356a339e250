// Products of few bfloat16 rows with a block of keys and values by AMX tiles, without a conversion to float.
#pragma once

#include "amx.h"
#include "few_rows.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

template <>
struct FewRowsByTiles<BFloat16> {
    using R = FewRows<BFloat16, float>;
    using Session = AmxProducts::Session;
    static constexpr bool kExist = true;
    static constexpr int64_t kBlock = R::kBlock, kUnit = R::kUnit, kTile = AmxMatrix::kTile, kLeastRows = 5;

    // K is loaded 16 keys at a time from where they lie, all at one distance. For up to four rows vectors are as
    // fast or faster.
    static bool suit(const AttentionParams& p) {
        return R::count(p) >= kLeastRows && p.head_dim_qk % 32 == 0 && p.head_dim_v % 32 == 0 && p.k.stride[3] == 1 &&
               p.v.stride[3] == 1 && p.page_size % 16 == 0;
    }

    // n rows of dim elements as the right-hand operand: (dim/32) tiles of 16 pairs of elements by 16 rows.
    void start(int64_t n, const float* q, int64_t dim) {
        uint16_t* rows = pairs_.reserve(16 * dim);  // exact: q was bfloat16
        std::fill(rows + n * dim, rows + 16 * dim, uint16_t(0));
        for (int64_t i = 0; i < n * dim; ++i) rows[i] = static_cast<uint16_t>(float_to_bits(q[i]) >> 16);
        uint16_t* to = q_.reserve(16 * dim);
        for (int64_t d = 0; d < dim; d += 32) {
            transpose_square(reinterpret_cast<const float*>(rows + d), dim / 2, reinterpret_cast<float*>(to + d * 16),
                             16);
        }
    }

    // s[r][c] = q_r · k_c: 16 keys (left) by 16 rows at a time, transposed. Keys lie `stride` elements apart.
    void products(const BFloat16* const* k, int64_t stride, int64_t keys, int64_t dim, float* s) {
        float* by_key = sums_.reserve(keys * 16);
        std::atomic_signal_fence(std::memory_order_seq_cst);  // tile loads are not known to read memory
        for (int64_t c = 0; c < keys; c += 32) {
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t i = 0; i < 32; ++i) R::fetch(k[c + i + kUnit], dim);
            for (int64_t d = 0; d < dim; d += 32) {
                _tile_loadd(4, q_.get() + d * 16, 64);
                _tile_loadd(5, k[c] + d, stride * 2);
                _tile_loadd(6, k[c + 16] + d, stride * 2);
                _tile_dpbf16ps(0, 5, 4);
                _tile_dpbf16ps(1, 6, 4);
            }
            _tile_stored(0, by_key + c * 16, 64);
            _tile_stored(1, by_key + (c + 16) * 16, 64);
        }
        for (int64_t c = 0; c < keys; c += 16) transpose_square(by_key + c * 16, 16, s + c, kBlock);
    }

    // out_r += sum over c of s[r][c] v_c, weights rounded to bfloat16. Neighbouring keys are joined in pairs, whose
    // low and high halves of 32 dims are two tiles: dims 0-3, 8-11, ... and 4-7, 12-15, ...
    void add_values(int64_t n, const float* s, const BFloat16* const* v, int64_t keys, int64_t dim, float* out) {
        for (int64_t c = 0; c < keys; c += kUnit) add_unit(n, s + c, v + c, dim, out);
    }

private:
    void add_unit(int64_t n, const float* s, const BFloat16* const* v, int64_t dim, float* out) {
        uint16_t* weights = weights_.reserve(16 * kUnit);
        for (int64_t r = 0; r < n; ++r) {
            for (int64_t c = 0; c < kUnit; c += 16) {
                store_narrow<float>(reinterpret_cast<BFloat16*>(weights + r * kUnit + c),
                                    load<float>(s + r * kBlock + c));
            }
        }
        uint16_t* pairs = pairs_.reserve(kUnit * dim);  // (keys/32, dim/16) tiles
        for (int64_t c = 0; c < kUnit; c += 2) {
            uint16_t* to = pairs + c / 32 * 32 * dim + c % 32 * 16;
            R::fetch(v[c + kUnit], dim);
            R::fetch(v[c + kUnit + 1], dim);
            for (int64_t d = 0; d < dim; d += 32) {
                const __m512i a = _mm512_loadu_si512(v[c] + d), b = _mm512_loadu_si512(v[c + 1] + d);
                _mm512_store_si512(to + d * 32, _mm512_unpacklo_epi16(a, b));
                _mm512_store_si512(to + d * 32 + kTile, _mm512_unpackhi_epi16(a, b));
            }
        }
        float* sums = sums_.reserve(16 * dim);
        std::atomic_signal_fence(std::memory_order_seq_cst);
        for (int64_t d = 0; d < dim; d += 32) {
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t c = 0; c < kUnit; c += 32) {
                _tile_loadd(4, weights + c, kUnit * 2);
                _tile_loadd(5, pairs + c * dim + d * 32, 64);
                _tile_loadd(6, pairs + c * dim + d * 32 + kTile, 64);
                _tile_dpbf16ps(0, 4, 5);
                _tile_dpbf16ps(1, 4, 6);
            }
            _tile_stored(0, sums + d * 16, 64);
            _tile_stored(1, sums + d * 16 + 256, 64);
        }
        for (int64_t r = 0; r < n; ++r) add_row(s + r * kBlock, v, dim, sums + r * 16, out + r * dim);
    }

    void add_row(const float* s, const BFloat16* const* v, int64_t dim, const float* sums, float* out) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        __m512 zero = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += 16) {
            const __m512 x = _mm512_load_ps(sums + d * 16);
            zero = _mm512_add_ps(zero, _mm512_sub_ps(x, x));
        }
        // Inf or NaN: what is unseen must not be felt.
        if (_mm512_reduce_add_ps(zero) != 0) return R::add_values(1, s, v, kUnit, dim, one_row_, out);
        for (int64_t d = 0; d < dim; d += 32) {
            const __m512 low = _mm512_load_ps(sums + d * 16), high = _mm512_load_ps(sums + d * 16 + 256);
            const __m512 a = _mm512_permutex2var_ps(low, first, high), b = _mm512_permutex2var_ps(low, second, high);
            _mm512_storeu_ps(out + d, _mm512_add_ps(_mm512_loadu_ps(out + d), a));
            _mm512_storeu_ps(out + d + 16, _mm512_add_ps(_mm512_loadu_ps(out + d + 16), b));
        }
    }

    Buffer<uint16_t> q_, weights_, pairs_;
    Buffer<float> sums_, one_row_;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
