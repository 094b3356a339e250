// In the place of csrc/cuda/ptx/opaque.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

inline uint32_t opaque(uint32_t x) { return x; }
inline int opaque(int x) { return x; }

}  // namespace fastattn::cuda
