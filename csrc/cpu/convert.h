// The four element types, and rows of a tensor to and from the compute type.
#pragma once

#include "../params.h"
#include "vector.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
// Exact: the exponent is rebased by a product, which also carries subnormals; inf and NaN get all exponent bits.
inline float widen(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    const float scaled = bits_to_float(magnitude) * 0x1p112f;
    return bits_to_float(sign | float_to_bits(scaled) | ((x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u));
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(double x, float& to) { to = static_cast<float>(x); }
inline void narrow(float x, double& to) { to = x; }
// Round to nearest, ties to even.
inline void narrow(float x, BFloat16& to) {
    const uint32_t bits = float_to_bits(x);
    to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Half& to) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000;
    const float magnitude = std::fabs(x);
    uint32_t half;
    if (x != x) {
        half = 0x7e00;
    } else if (magnitude >= 65520.0f) {
        half = 0x7c00;
    } else if (magnitude < 0x1p-14f) {
        half = float_to_bits(magnitude + 0.5f) & 0xffff;  // 0.5 puts the unit of a subnormal half in the last bit
    } else {
        const uint32_t rebased = float_to_bits(magnitude) - (112u << 23);
        half = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | half);
}
inline void narrow(double x, BFloat16& to) { narrow(static_cast<float>(x), to); }
inline void narrow(double x, Half& to) { narrow(static_cast<float>(x), to); }

// The rows of one head, wherever they lie: at equal distances, or in pages of `page_size` rows each.
template <typename T>
struct Rows {
    const T* data;
    int64_t row, dim;  // strides
    const int32_t* pages = nullptr;
    int64_t pages_stride = 0, page_size = 1, page_stride = 0;

    const T* at(int64_t i) const {
        if (pages == nullptr) return data + i * row;
        return data + pages[i / page_size * pages_stride] * page_stride + i % page_size * row;
    }
};

template <typename T>
inline const T* at(const Tensor4& x, int64_t b, int64_t h, int64_t i) {
    return static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
}
template <typename T>
inline T* at_mutable(const Tensor4& x, int64_t b, int64_t h, int64_t i) {
    return const_cast<T*>(at<T>(x, b, h, i));
}

template <typename T, typename C>
inline void read_row(const T* from, int64_t stride, int64_t n, C* to) {
    if (stride == 1) {
        for (int64_t d = 0; d < n; ++d) to[d] = widen(from[d]);
    } else {
        for (int64_t d = 0; d < n; ++d) to[d] = widen(from[d * stride]);
    }
}

template <typename C, typename T>
inline void write_row(const C* from, C factor, int64_t n, T* to, int64_t stride) {
    if (stride == 1) {
        for (int64_t d = 0; d < n; ++d) narrow(from[d] * factor, to[d]);
    } else {
        for (int64_t d = 0; d < n; ++d) narrow(from[d] * factor, to[d * stride]);
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
