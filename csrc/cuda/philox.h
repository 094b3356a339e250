// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "cuda/ptx/arithmetic.h"

namespace fastattn::cuda {

struct Philox4 {
    uint32_t word[4];
};

FASTATTN_DEVICE Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
    constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
    constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    uint32_t (&c)[4] = counter.word;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = multiply_high(kMultiplier0, c[0]), low0 = kMultiplier0 * c[0];
        const uint32_t high1 = multiply_high(kMultiplier1, c[2]), low1 = kMultiplier1 * c[2];
        c[0] = high1 ^ c[1] ^ key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1;
        c[3] = low0;
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return counter;
}

}  // namespace fastattn::cuda
