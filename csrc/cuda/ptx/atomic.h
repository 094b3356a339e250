// Sums and messages between blocks, in global memory.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Parallel Synchronization and Communication Instructions: red". Relaxed: other blocks may read the sum after
// the kernel, not before. HAZARD: the order of the additions, and so the rounding, differs from run to run.
FASTATTN_DEVICE void reduce_add(float* p, float value) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(value) : "memory");
}

// Two or four neighbours, aligned to 8 or 16 bytes; one instruction from sm_90 on.
FASTATTN_DEVICE void reduce_add(float* p, float x, float y) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
#else
    reduce_add(p, x);
    reduce_add(p + 1, y);
#endif
}
FASTATTN_DEVICE void reduce_add(float* p, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w)
                 : "memory");
#else
    reduce_add(p, x, y);
    reduce_add(p + 2, z, w);
#endif
}

// The same section: red.release. What this thread wrote or has seen through a barrier is seen by who acquires.
FASTATTN_DEVICE void reduce_add_release(int32_t* p, int32_t value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// PTX ISA, "...: atom". Returns the value before. Relaxed, and with both acquire and release.
FASTATTN_DEVICE int32_t atomic_add(int32_t* p, int32_t value) {
    int32_t before;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
    return before;
}
FASTATTN_DEVICE int32_t atomic_add_acq_rel(int32_t* p, int32_t value) {
    int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
    return before;
}

// PTX ISA, "Data Movement and Conversion Instructions: ld.acquire, st.release".
FASTATTN_DEVICE int32_t load_acquire(const int32_t* p) {
    int32_t value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
FASTATTN_DEVICE void store_release(int32_t* p, int32_t value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// Waits, acquiring, until the value is there. HAZARD: whoever writes it must run at the same time or before.
FASTATTN_DEVICE void wait_until_equal(const int32_t* p, int32_t value) {
    while (load_acquire(p) != value) {
    }
}

// PTX ISA, "...: membar, fence": fence.acq_rel.gpu.
FASTATTN_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace fastattn::cuda
