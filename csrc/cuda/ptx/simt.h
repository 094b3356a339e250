// The CUDA execution model behind plain functions: thread indices, barriers, shuffles, conversions.
// Kernels use nothing else of the language, so that tests/cuda_emulation can put ordinary C++ in this header's place.
#pragma once

#include <cstdint>

#include "params.h"

#define FASTATTN_DEVICE __device__ __forceinline__
// A kernel of kThreads threads a block that takes AttentionParams by value, read from constant memory.
#define FASTATTN_KERNEL(name, threads, params) \
    __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__::fastattn::AttentionParams params)
// One object of the block in shared memory, uninitialised.
#define FASTATTN_SHARED(type, name) __shared__ type name

namespace fastattn::cuda {

// 16-bit elements as they lie in memory; arithmetic is in float.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

FASTATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTATTN_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }

FASTATTN_DEVICE void barrier() { __syncthreads(); }
// A barrier that tells every thread whether the condition held in any.
FASTATTN_DEVICE bool barrier_or(bool condition) { return __syncthreads_or(condition) != 0; }
// The value of the lane whose number differs in the bits of the mask. All 32 lanes take part.
FASTATTN_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

FASTATTN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
FASTATTN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }

// PTX ISA, "Data Movement and Conversion Instructions: cvt": .rn is round to nearest even; f16 and bf16 keep NaN,
// overflow gives infinity. cvt.rn.bf16.f32 needs sm_80.
FASTATTN_DEVICE float to_float(float x) { return x; }
FASTATTN_DEVICE float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
FASTATTN_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

FASTATTN_DEVICE void from_float(float x, float& y) { y = x; }
FASTATTN_DEVICE void from_float(float x, Half& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
FASTATTN_DEVICE void from_float(float x, BFloat16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

}  // namespace fastattn::cuda
