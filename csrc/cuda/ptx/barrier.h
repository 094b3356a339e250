// Barriers of a block, of some of its warps, of a warp.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Parallel Synchronization and Communication Instructions: bar, barrier". All threads of the block take part.
FASTATTN_DEVICE void barrier() { __syncthreads(); }

// A barrier that tells every thread whether the condition held in any.
FASTATTN_DEVICE bool barrier_or(bool condition) { return __syncthreads_or(condition) != 0; }

// The same section: bar.sync, bar.arrive. `threads` counts those that wait and those that only arrive, whole warps;
// id is 1 .. 15 (0 is barrier()).
FASTATTN_DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTATTN_DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// PTX ISA, "...: bar.warp.sync". What lanes wrote before is seen by the other lanes after.
FASTATTN_DEVICE void warp_barrier() { __syncwarp(); }

}  // namespace fastattn::cuda
