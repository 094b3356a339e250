// Vectors as the compiler spells them, and exp. Included once per instruction set (FASTATTN_CPU_ISA names the
// namespace), so every function here is inlined for the flags of its translation unit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastattn::cpu::FASTATTN_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;  // 6 x 4 accumulators + 4 of B + 1 of A: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;  // 6 x 2 accumulators + 2 of B + 1 of A: 15 of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

template <typename C>
struct VectorOf {
    typedef C type __attribute__((vector_size(kVectorBytes)));
};
template <typename C>
using Vector = typename VectorOf<C>::type;
// Two bfloat16 numbers that are multiplied by two others as one, the first in the lower half.
using Pair = uint32_t;
template <typename C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));
// Columns of a register tile, and so the width of the panels that hold a right-hand operand.
template <typename C>
constexpr int kPanel = kTileVectors * kLanes<C>;

template <typename C>
inline Vector<C> load(const C* p) {
    Vector<C> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <typename C>
inline void store(C* p, Vector<C> v) {
    std::memcpy(p, &v, sizeof v);
}
template <typename C>
inline Vector<C> splat(C x) {
    return x - Vector<C>{};
}

// The larger of two; b where they do not compare.
template <typename C>
inline Vector<C> larger(Vector<C> a, Vector<C> b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) return (Vector<C>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
    return a > b ? a : b;
}
// x where keep is not 0, else 0.
template <typename C>
inline Vector<C> kept_only(Vector<C> x, const uint8_t* keep) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keep));
        return (Vector<C>)_mm512_maskz_mov_ps(_mm_test_epi8_mask(bytes, bytes), (__m512)x);
    }
#endif
    for (int i = 0; i < kLanes<C>; ++i) x[i] = keep[i] ? x[i] : C(0);
    return x;
}

template <typename C>
inline C sum_of(Vector<C> v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
    C total = v[0];
    for (int i = 1; i < kLanes<C>; ++i) total += v[i];
    return total;
}
template <typename C>
inline C max_of(Vector<C> v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
    C top = v[0];
    for (int i = 1; i < kLanes<C>; ++i) top = v[i] > top ? v[i] : top;
    return top;
}

constexpr double kLog2E = 1.4426950408889634, kLog2ELow = 2.0355273740931033e-17;

template <typename C>
struct Exp2;

// 2^f on [-1/2, 1/2] by the minimax polynomial of degree 6: relative error 1.9e-9 before rounding.
template <>
struct Exp2<float> {
    using Integer = int32_t;
    static constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer in the low bits
    static constexpr float kLowest = -87.33654f;  // ln(2^-126)
    static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;  // 9 bits, and the rest
    static constexpr int kMantissa = 23;
    static constexpr Integer kExponentBias = 127;
    static constexpr float kCoefficients[] = {1.53458205475e-4f, 1.33999312578e-3f, 9.6184889235e-3f, 5.55032877688e-2f,
                                              2.4022646891e-1f,  6.93147205737e-1f, 1.00000000055f};
};

// The Taylor polynomial of degree 13, ln(2)^k / k!: remainder below 5e-18.
template <>
struct Exp2<double> {
    using Integer = int64_t;
    static constexpr double kRound = 6755399441055744.0;                                       // 1.5 · 2^52
    static constexpr double kLowest = -708.3964185322641;                                      // ln(2^-1022)
    static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;  // 32 bits, and the rest
    static constexpr int kMantissa = 52;
    static constexpr Integer kExponentBias = 1023;
    static constexpr double kCoefficients[] = {1.3691488853904128e-12, 2.5678435993488205e-11,
                                               4.4455382718708116e-10, 7.0549116208011233e-09,
                                               1.0178086009239699e-07, 1.3215486790144309e-06,
                                               1.5252733804059841e-05, 1.5403530393381610e-04,
                                               1.3333558146428443e-03, 9.6181291076284772e-03,
                                               5.5504108664821580e-02, 2.4022650695910072e-01,
                                               6.9314718055994531e-01, 1.0};
};

// p · 2^n, 0 where x is below the smallest normal number's logarithm, NaN where p is; shifted = n + kRound.
template <typename C>
inline Vector<C> times_power(Vector<C> p, Vector<C> x, [[maybe_unused]] Vector<C> n, Vector<C> shifted) {
    using E = Exp2<C>;
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {  // one comparison and one scaling, where the general way takes five operations
        const __m512 v = (__m512)x;
        const __mmask16 normal = _mm512_cmp_ps_mask(v, _mm512_set1_ps(E::kLowest), _CMP_NLT_UQ);
        return (Vector<C>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
    }
#endif
    Vector<typename E::Integer> exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + E::kExponentBias) << E::kMantissa;
    Vector<C> power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < splat<C>(E::kLowest) ? Vector<C>{} : p * power;
}

// e^x for x <= 0 (a little above is fine); 0 below the smallest normal number; NaN stays NaN. With x log2(e) = n + f,
// f is taken from x so that a large x costs no digits: by fused multiply-adds with log2(e) in two parts; or, where
// compilers may not fuse these (Arm has no vector a * b - c, GCC avoids chains of them in AVX2), from x - n ln(2), with
// ln(2) in two parts of which n times the first is exact (Cody and Waite 1980).
// Relative error below 2^-22 (float), 2^-51 (double).
template <typename C>
inline Vector<C> exp(Vector<C> x) {
    using E = Exp2<C>;
    constexpr C kHigh = static_cast<C>(kLog2E);
    [[maybe_unused]] constexpr C kLow = static_cast<C>(kLog2ELow + (kLog2E - static_cast<double>(kHigh)));
    const Vector<C> shifted = x * splat<C>(kHigh) + splat<C>(E::kRound);
    const Vector<C> n = shifted - splat<C>(E::kRound);
#if defined(__AVX512F__)
    const Vector<C> high = x * splat<C>(kHigh) - n;
    const Vector<C> f = x * splat<C>(kLow) + high;
#else
    const Vector<C> f = (x - n * splat(E::kLn2High) - n * splat(E::kLn2Low)) * splat(kHigh);
#endif
    Vector<C> p = splat<C>(E::kCoefficients[0]);
    for (size_t k = 1; k < sizeof(E::kCoefficients) / sizeof(C); ++k) {
        p = p * f + splat<C>(E::kCoefficients[k]);
    }
    return times_power<C>(p, x, n, shifted);
}

// tanh: near 0 in float, x + x³ P(x²) (the Cephes library's polynomial); elsewhere (1 - e) / (1 + e), e = exp(-2 |x|).
template <typename C>
inline Vector<C> tanh(Vector<C> x) {
    if constexpr (sizeof(C) == 8) {
        for (int i = 0; i < kLanes<C>; ++i) x[i] = std::tanh(x[i]);
        return x;
    } else {
        const Vector<C> magnitude = x < Vector<C>{} ? -x : x, e = exp<C>(magnitude * splat<C>(-2));
        const Vector<C> far = (splat<C>(1) - e) / (splat<C>(1) + e), z = x * x;
        Vector<C> p = splat<C>(-5.70498872745e-3f);
        for (const C c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) {
            p = p * z + splat<C>(c);
        }
        const Vector<C> near = p * z * x + x;
        return magnitude < splat<C>(0.625f) ? near : x < Vector<C>{} ? -far : far;
    }
}

template <typename C>
inline C exp_of(C x) {
    return exp<C>(splat<C>(x))[0];
}

template <typename C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
