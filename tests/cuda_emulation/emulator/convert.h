// float and its 16-bit relatives, bit for bit as cvt.rn.
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

}  // namespace fastattn::cuda::emulation
