// 8-bit floats: 4 bits of exponent, 3 of mantissa; at most 448, 2^-9 the smallest, NaN but no infinity (sm_89).
#pragma once

#include "cuda/ptx/convert.h"

namespace fastattn::cuda {

struct E4M3 {
    uint8_t bits;
};

// PTX ISA, "Data Movement and Conversion Instructions: cvt": to f16, which holds all of them.
FASTATTN_DEVICE float to_float(E4M3 x) {
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(x.bits)));
    return to_float(Half{static_cast<uint16_t>(pair)});
}

// The same section: four of them in one register, the first in the low byte, rounded to nearest even; beyond 448
// becomes 448 (.satfinite), NaN stays NaN.
FASTATTN_DEVICE uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    uint32_t packed;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(packed)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return packed;
}

}  // namespace fastattn::cuda
