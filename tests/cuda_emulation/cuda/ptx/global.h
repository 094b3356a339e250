// In the place of csrc/cuda/ptx/global.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/memory_types.h"

namespace fastattn::cuda {

template <typename T>
T load_global(const T* p, Where where = Where::here()) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    static_assert(alignof(T) == sizeof(T));
    T value;
    emulation::load_global(p, &value, sizeof(T), false, where);
    return value;
}
template <typename T>
T load_global_constant(const T* p, Where where = Where::here()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    static_assert(alignof(T) == sizeof(T));
    T value;
    emulation::load_global(p, &value, sizeof(T), true, where);
    return value;
}
template <typename T>
void store_global(T* p, const T& value, Where where = Where::here()) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    static_assert(alignof(T) == sizeof(T));
    emulation::store_global(p, &value, sizeof(T), where);
}

}  // namespace fastattn::cuda
