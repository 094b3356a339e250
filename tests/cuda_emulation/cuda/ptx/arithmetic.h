// In the place of csrc/cuda/ptx/arithmetic.h: the same names on the emulator.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

namespace emulation {
// .ftz: subnormal numbers are 0, of the same sign.
inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.f, x) : x; }
}  // namespace emulation

inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
inline float exp2_approx(float x) { return emulation::flush(std::exp2(emulation::flush(x))); }
inline float log2_approx(float x) { return emulation::flush(std::log2(emulation::flush(x))); }
inline float reciprocal_approx(float x) { return emulation::flush(1.f / emulation::flush(x)); }
inline float tanh_approx(float x) { return std::tanh(x); }

}  // namespace fastattn::cuda
