// float and its narrower relatives, bit for bit as cvt.rn.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastattn::cuda::emulation {

inline float half_to_float(uint16_t bits) {
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    float x;
    std::memcpy(&x, &magnitude, sizeof x);
    x *= 0x1p112f;  // the exponents' biases differ by 112; subnormals become normal
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    if ((bits & 0x7c00u) == 0x7c00u) wide = 0x7f800000u | magnitude;
    wide |= (bits & 0x8000u) << 16;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

inline uint16_t float_to_half(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return std::isnan(x) ? 0x7fff : bits;
}

inline float bfloat16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

inline uint16_t float_to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float e4m3_to_float(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return std::nanf("");
    const float x = exponent ? std::ldexp(static_cast<float>(8 + mantissa), exponent - 10) : mantissa * 0x1p-9f;
    return bits & 0x80 ? -x : x;
}

// .satfinite: what is larger than the largest becomes the largest.
inline uint8_t float_to_e4m3(float x) {
    if (std::isnan(x)) return 0x7f;
    const int sign = std::signbit(x) ? 0x80 : 0;
    const float size = std::fabs(x);
    if (size >= 464.f) return static_cast<uint8_t>(sign | 0x7e);
    const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // 8 .. 16, 0 .. 8 below 2^-6
    return static_cast<uint8_t>(sign | (((exponent + 6) << 3) + units));
}

}  // namespace fastattn::cuda::emulation
