// In the place of csrc/cuda/ptx/mma.h: the same names on the emulator.
#pragma once

#include <type_traits>

#include "cuda/ptx/convert.h"

namespace fastattn::cuda {

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where = Where::here()) {
    static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
    emulation::mma_m16n8k16(std::is_same_v<T, BFloat16>, d, a, b0, b1, where);
}

}  // namespace fastattn::cuda
