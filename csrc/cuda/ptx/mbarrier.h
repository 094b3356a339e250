// mbarriers (sm_90): eight bytes of shared memory that count arrivals of threads and bytes of bulk copies.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". A phase ends when `count` arrivals have
// come and as many bytes as were expected; phases alternate in parity, the first is 0.
FASTATTN_DEVICE void mbarrier_init(uint32_t address, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
}

// "...: fence.mbarrier_init": makes this thread's inits visible to bulk copies; other threads need a barrier as well.
FASTATTN_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and releases what this thread has written or seen.
FASTATTN_DEVICE void mbarrier_arrive(uint32_t address) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}

// Arrives, and lets the phase wait for so many bytes of bulk copies. HAZARD: before the copies are issued.
FASTATTN_DEVICE void mbarrier_arrive_expect_tx(uint32_t address, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}

// Whether the phase of that parity has ended; may sleep a while before it says no. Acquires.
FASTATTN_DEVICE bool mbarrier_try_wait(uint32_t address, int parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    return done != 0;
}

// Until the phase of that parity has ended. A barrier's first phase has parity 0, so that waiting for parity 1 of a new
// barrier returns at once: an empty slot of a ring.
FASTATTN_DEVICE void mbarrier_wait(uint32_t address, int parity) {
    while (!mbarrier_try_wait(address, parity)) {
    }
}

// PTX ISA, "...: membar, fence": fence.proxy.async. What this thread wrote to shared memory before is seen by bulk
// copies and wgmma after.
FASTATTN_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace fastattn::cuda
