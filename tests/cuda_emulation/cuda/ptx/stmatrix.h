// In the place of csrc/cuda/ptx/stmatrix.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"
#include "emulator/hopper.h"

namespace fastattn::cuda {

inline void stmatrix_x2(uint32_t address, const uint32_t (&r)[2], Where where = Where::here()) {
    emulation::stmatrix(address, r, 2, false, where);
}
inline void stmatrix_x2_trans(uint32_t address, const uint32_t (&r)[2], Where where = Where::here()) {
    emulation::stmatrix(address, r, 2, true, where);
}
inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4], Where where = Where::here()) {
    emulation::stmatrix(address, r, 4, false, where);
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4], Where where = Where::here()) {
    emulation::stmatrix(address, r, 4, true, where);
}

}  // namespace fastattn::cuda
