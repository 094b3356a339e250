// 16-bit elements and what turns them into float and back.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// 16-bit elements as they lie in memory; arithmetic is in float.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
struct Float2 {
    float x, y;
};

FASTATTN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
FASTATTN_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// PTX ISA, "Data Movement and Conversion Instructions: cvt": .rn is round to nearest even; f16 and bf16 keep NaN,
// overflow gives infinity. cvt.rn.bf16.f32 needs sm_80.
FASTATTN_DEVICE float to_float(float x) { return x; }
FASTATTN_DEVICE float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
FASTATTN_DEVICE float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

FASTATTN_DEVICE void from_float(float x, float& y) { y = x; }
FASTATTN_DEVICE void from_float(float x, Half& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
FASTATTN_DEVICE void from_float(float x, BFloat16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// Two elements in one register, the first in the low half: cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32.
template <typename T>
FASTATTN_DEVICE uint32_t pack(float low, float high);
template <>
FASTATTN_DEVICE uint32_t pack<Half>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
template <>
FASTATTN_DEVICE uint32_t pack<BFloat16>(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <typename T>
FASTATTN_DEVICE Float2 unpack(uint32_t packed) {
    return {to_float(T{static_cast<uint16_t>(packed)}), to_float(T{static_cast<uint16_t>(packed >> 16)})};
}

}  // namespace fastattn::cuda
