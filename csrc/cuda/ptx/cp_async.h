// Copies from global to shared memory that run beside the thread that issued them.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Data Movement and Conversion Instructions: cp.async". kBytes is 4, 8 or 16, both addresses aligned to it.
// Where not valid, the destination becomes 0 and the source is not read. 16 bytes bypass L1.
template <int kBytes>
FASTATTN_DEVICE void cp_async(uint32_t shared, const void* global, bool valid = true) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
    const int bytes = valid ? kBytes : 0;
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes), "r"(bytes)
                     : "memory");
    }
}

// "...: cp.async.commit_group": closes the group of this thread's copies since the last one; it may be empty.
FASTATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// "...: cp.async.wait_group": until at most kPending of this thread's groups are in flight. HAZARD: the copies of other
// threads are there after a barrier that follows their wait.
template <int kPending>
FASTATTN_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fastattn::cuda
