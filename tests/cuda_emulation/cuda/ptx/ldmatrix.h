// In the place of csrc/cuda/ptx/ldmatrix.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

inline void ldmatrix_x1(uint32_t (&r)[1], uint32_t address, Where where = Where::here()) {
    emulation::ldmatrix(r, 1, false, address, where);
}
inline void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t address, Where where = Where::here()) {
    emulation::ldmatrix(r, 1, true, address, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address, Where where = Where::here()) {
    emulation::ldmatrix(r, 2, false, address, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address, Where where = Where::here()) {
    emulation::ldmatrix(r, 2, true, address, where);
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, Where where = Where::here()) {
    emulation::ldmatrix(r, 4, false, address, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, Where where = Where::here()) {
    emulation::ldmatrix(r, 4, true, address, where);
}

}  // namespace fastattn::cuda
