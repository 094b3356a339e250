// In the place of csrc/cuda/ptx/shuffle.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/memory_types.h"

namespace fastattn::cuda {

template <typename T>
T shuffle_xor(T value, int mask, Where where = Where::here()) {
    return bit_cast<T>(emulation::shuffle_xor(bit_cast<uint32_t>(value), mask, where));
}
template <typename T>
T shuffle(T value, int lane, Where where = Where::here()) {
    return bit_cast<T>(emulation::shuffle(bit_cast<uint32_t>(value), lane, where));
}
inline bool any_lane(bool condition, Where where = Where::here()) { return emulation::ballot(condition, where) != 0; }
inline uint32_t warp_ballot(bool condition, Where where = Where::here()) { return emulation::ballot(condition, where); }

}  // namespace fastattn::cuda
