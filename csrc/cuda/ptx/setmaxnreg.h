// Registers handed from warps that need few to warps that need many (sm_90a).
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Miscellaneous Instructions: setmaxnreg". All warps of a warpgroup; a multiple of 8 in 24 .. 256. Increasing
// waits until others have decreased.
template <int kRegisters>
FASTATTN_DEVICE void setmaxnreg_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FASTATTN_DEVICE void setmaxnreg_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fastattn::cuda
