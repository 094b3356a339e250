// Rows of bfloat16 on their way into products that take two neighbours along the depth at once.
#pragma once

#include "pack.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// Rows [i, i + rows) of x as rows of `wide` elements, 0 beyond row seq and column dim; whether they hold inf or NaN.
inline bool read_bfloat16(const Rows<BFloat16>& x, int64_t i, int64_t rows, int64_t seq, int64_t dim, int64_t wide,
                          uint16_t* to) {
    int non_finite = 0;
    for (int64_t r = 0; r < rows; ++r, to += wide) {
        const int64_t n = i + r < seq ? dim : 0;
        if (n > 0) {
            const BFloat16* from = x.at(i + r);
            if (x.dim == 1) {
                std::memcpy(to, from, static_cast<size_t>(n) * 2);
            } else {
                for (int64_t d = 0; d < n; ++d) to[d] = from[d * x.dim].bits;
            }
            for (int64_t d = 0; d < n; ++d) non_finite |= (to[d] & 0x7f80) == 0x7f80;
        }
        std::fill(to + n, to + wide, uint16_t(0));
    }
    return non_finite != 0;
}

// 16 elements of one row and 16 of another, each two in one lane.
inline __m512i pairs_of(const uint16_t* low, const uint16_t* high) {
    const auto wide = [](const uint16_t* from) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    };
    return _mm512_or_si512(wide(low), _mm512_slli_epi32(wide(high), 16));
}

// The upper and the lower half of the bits of `low` and `high`, each pair in one word.
struct SplitPair {
    __m512i upper, lower;

    SplitPair(Vector<float> low, Vector<float> high) {
        const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        const auto join = [&](__m512i a, __m512i b) {
            return _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, mask, 0xf8);  // a | (b & mask)
        };
        const auto rest = [&](__m512 x, __m512i bits) {
            return _mm512_castps_si512(_mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(bits, mask))));
        };
        const __m512i a = _mm512_castps_si512((__m512)low), b = _mm512_castps_si512((__m512)high);
        upper = join(a, b);
        lower = join(rest((__m512)low, a), rest((__m512)high, b));
    }
};

template <typename P>
class RoundedBlocks;  // bfloat16_forward.h

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
