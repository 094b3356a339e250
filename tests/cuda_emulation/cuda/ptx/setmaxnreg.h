// In the place of csrc/cuda/ptx/setmaxnreg.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"
#include "emulator/hopper.h"

namespace fastattn::cuda {

template <int kRegisters>
void setmaxnreg_increase(Where where = Where::here()) {
    emulation::setmaxnreg(kRegisters, true, where);
}
template <int kRegisters>
void setmaxnreg_decrease(Where where = Where::here()) {
    emulation::setmaxnreg(kRegisters, false, where);
}

}  // namespace fastattn::cuda
