// In the place of csrc/cuda/ptx/shared.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/memory_types.h"

namespace fastattn::cuda {

inline uint32_t smem_base() { return emulation::kSharedBase; }

template <typename T>
T load_shared(uint32_t address, Where where = Where::here()) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    emulation::load_shared(address, &value, sizeof(T), where);
    return value;
}
template <typename T>
void store_shared(uint32_t address, const T& value, Where where = Where::here()) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    emulation::store_shared(address, &value, sizeof(T), where);
}

}  // namespace fastattn::cuda
