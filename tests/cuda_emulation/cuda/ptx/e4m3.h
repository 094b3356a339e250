// In the place of csrc/cuda/ptx/e4m3.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/convert.h"

namespace fastattn::cuda {

struct E4M3 {
    uint8_t bits;
};

inline float to_float(E4M3 x) { return emulation::e4m3_to_float(x.bits); }

inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    const float x[] = {x0, x1, x2, x3};
    uint32_t packed = 0;
    for (int n = 0; n < 4; ++n) packed |= uint32_t{emulation::float_to_e4m3(x[n])} << (8 * n);
    return packed;
}

}  // namespace fastattn::cuda
