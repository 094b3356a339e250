// Barriers in shared memory that count arrivals and bytes of asynchronous copies; sm_90.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". Eight bytes, aligned to eight. A phase
// ends when `arrivals` threads have arrived and all bytes expected in it have come.
FASTATTN_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// "...: fence.mbarrier_init": makes the initialisation visible to asynchronous copies. A barrier of the block follows.
FASTATTN_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

FASTATTN_DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and expects that many bytes more in this phase.
FASTATTN_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended. Phases are numbered from 0; before the first ends, the one of parity 1
// counts as ended. HAZARD: a waiter that falls two phases behind waits for the wrong one.
FASTATTN_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

}  // namespace fastattn::cuda
