// In the place of csrc/cuda/ptx/convert.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"
#include "emulator/convert.h"

namespace fastattn::cuda {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
struct Float2 {
    float x, y;
};

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return emulation::half_to_float(x.bits); }
inline float to_float(BFloat16 x) { return emulation::bfloat16_to_float(x.bits); }

inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, Half& y) { y.bits = emulation::float_to_half(x); }
inline void from_float(float x, BFloat16& y) { y.bits = emulation::float_to_bfloat16(x); }

template <typename T>
uint32_t pack(float low, float high) {
    T a, b;
    from_float(low, a);
    from_float(high, b);
    return a.bits | uint32_t{b.bits} << 16;
}
template <typename T>
Float2 unpack(uint32_t packed) {
    return {to_float(T{static_cast<uint16_t>(packed)}), to_float(T{static_cast<uint16_t>(packed >> 16)})};
}

}  // namespace fastattn::cuda
