// Values of other lanes. All 32 lanes of the warp take part.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Data Movement and Conversion Instructions: shfl.sync". T: four bytes.
// The value of the lane whose number differs in the bits of the mask.
template <typename T>
FASTATTN_DEVICE T shuffle_xor(T value, int mask) {
    static_assert(sizeof(T) == 4);
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of one lane.
template <typename T>
FASTATTN_DEVICE T shuffle(T value, int lane) {
    static_assert(sizeof(T) == 4);
    return __shfl_sync(0xffffffffu, value, lane);
}

// PTX ISA, "Parallel Synchronization and Communication Instructions: vote.sync".
FASTATTN_DEVICE bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition) != 0; }
FASTATTN_DEVICE uint32_t warp_ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }

}  // namespace fastattn::cuda
