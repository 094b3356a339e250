// Arithmetic that C++ has no function for. Approximate results are within the errors that the PTX ISA states;
// subnormal inputs and results are 0.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Integer Arithmetic Instructions: mul.hi".
FASTATTN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// PTX ISA, "Floating Point Instructions: ex2". exp2(-inf) = +0. Maximum error 2 ulp.
FASTATTN_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// PTX ISA, "Floating Point Instructions: lg2". log2(0) = -inf. Maximum absolute error 2^-22 where the result is small.
FASTATTN_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// PTX ISA, "Floating Point Instructions: rcp". Maximum error 1 ulp.
FASTATTN_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// PTX ISA, "Floating Point Instructions: tanh". Maximum relative error 2^-11.
FASTATTN_DEVICE float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace fastattn::cuda
