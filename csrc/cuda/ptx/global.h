// Global memory.
#pragma once

#include "cuda/ptx/memory_types.h"

namespace fastattn::cuda {

// PTX ISA, "Data Movement and Conversion Instructions: ld". T of 1, 2, 4, 8 or 16 bytes, aligned to its size: one
// instruction of that width.
template <typename T>
FASTATTN_DEVICE T load_global(const T* p) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    static_assert(alignof(T) == sizeof(T));
    return *p;
}

// The same section: ld.global.nc. HAZARD: nothing may write there while the kernel runs.
template <typename T>
FASTATTN_DEVICE T load_global_constant(const T* p) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    static_assert(alignof(T) == sizeof(T));
    if constexpr (sizeof(T) == 4) {
        return bit_cast<T>(__ldg(reinterpret_cast<const unsigned*>(p)));
    } else if constexpr (sizeof(T) == 8) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
        return bit_cast<T>(Words2{v.x, v.y});
    } else {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
        return bit_cast<T>(Words4{v.x, v.y, v.z, v.w});
    }
}

// PTX ISA, "Data Movement and Conversion Instructions: st". The same sizes as load_global.
template <typename T>
FASTATTN_DEVICE void store_global(T* p, const T& value) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    static_assert(alignof(T) == sizeof(T));
    *p = value;
}

}  // namespace fastattn::cuda
