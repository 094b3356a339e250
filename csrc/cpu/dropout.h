// Which entries dropout keeps: Philox4x32-10 (Salmon et al., SC 2011), one counter in each 64-bit lane.
#pragma once

#include "pack.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastattn::cpu::FASTATTN_CPU_ISA {

using Words = Vector<uint64_t>;  // a 32-bit word in the low half of each lane, anything in the high half

// The 64-bit products of the words and m.
inline Words multiply_words(Words x, uint32_t m) {
#if defined(__AVX512F__)
    return (Words)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    return (Words)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#else
    return (x & 0xffffffffu) * m;
#endif
}

class Dropout {
public:
    static constexpr int kCounters = kLanes<uint64_t>;

    Dropout(const AttentionParams& p, int64_t b, int64_t h)
        : seed_(static_cast<uint64_t>(*p.dropout_seed)),
          head_(static_cast<uint64_t>(b * p.heads_q + h)),
          threshold_(p.dropout_threshold) {}

    // keep[i - i0][j - j0] for a tile of up to kMaxTileColumns columns, 1 = kept.
    void tile(int64_t i0, int64_t i1, int64_t j0, int64_t j1, uint8_t* keep, int64_t stride) const {
        using Bytes = uint32_t __attribute__((vector_size(4 * kCounters)));  // four to a counter
        const int64_t start = j0 / 4 * 4;
        uint8_t row[kMaxTileColumns + 4 + 4 * kCounters];
        for (int64_t i = i0; i < i1; ++i, keep += stride) {
            for (int64_t j = start; j < j1; j += 4 * kCounters) {
                Words word[4] = {lanes_from(j / 4), Words{} + static_cast<uint64_t>(i)};
                choose(word);
                const Words four = word[0] | word[1] << 8 | word[2] << 16 | word[3] << 24;
                const Bytes bytes = __builtin_convertvector(four, Bytes);
                std::memcpy(row + (j - start), &bytes, sizeof bytes);
            }
            std::memcpy(keep, row + (j0 - start), static_cast<size_t>(j1 - j0));
        }
    }

    // The same, transposed: keep[j - j0][i - i0], up to kMaxTileColumns queries.
    void tile_transposed(int64_t i0, int64_t i1, int64_t j0, int64_t j1, uint8_t* keep, int64_t stride) const {
        using Bytes = uint8_t __attribute__((vector_size(kCounters)));
        uint8_t rows[4][kMaxTileColumns + kCounters];
        for (int64_t j = j0 / 4 * 4; j < j1; j += 4) {
            for (int64_t i = i0; i < i1; i += kCounters) {
                Words word[4] = {Words{} + static_cast<uint64_t>(j / 4), lanes_from(i)};
                choose(word);
                for (int w = 0; w < 4; ++w) {
                    const Bytes bytes = __builtin_convertvector(word[w], Bytes);
                    std::memcpy(rows[w] + (i - i0), &bytes, sizeof bytes);
                }
            }
            for (int64_t w = std::max(j, j0); w < std::min(j + 4, j1); ++w) {
                std::memcpy(keep + (w - j0) * stride, rows[w - j], static_cast<size_t>(i1 - i0));
            }
        }
    }

private:
    static Words lanes_from(int64_t first) {
        alignas(kVectorBytes) static constexpr uint64_t kSteps[] = {0, 1, 2, 3, 4, 5, 6, 7};
        return load<uint64_t>(kSteps) + static_cast<uint64_t>(first);
    }

    // Sets the counters' last two words, and turns the four into 1 where the entry is kept, else 0.
    void choose(Words (&word)[4]) const {
        word[2] = Words{} + (head_ & 0xffffffffu), word[3] = Words{} + (head_ >> 32);
        uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const Words p0 = multiply_words(word[0], 0xD2511F53u), p1 = multiply_words(word[2], 0xCD9E8D57u);
            word[0] = (p1 >> 32) ^ word[1] ^ key0, word[1] = p1;
            word[2] = (p0 >> 32) ^ word[3] ^ key1, word[3] = p0;
            key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
        }
        // w - threshold, of 32 and 33 bits, is negative where the entry is dropped.
        for (Words& w : word) w = ~((w & 0xffffffffu) - threshold_) >> 63;
    }

    const uint64_t seed_, head_, threshold_;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
