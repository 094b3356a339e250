// Registers that a warpgroup hands to another; sm_90a.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// PTX ISA, "Miscellaneous Instructions: setmaxnreg": registers of each thread, a multiple of 8 in 24 .. 256. All warps
// of a warpgroup execute it. HAZARD: increase waits until as many are free; together no more than the launch had.
template <int kRegisters>
FASTATTN_DEVICE void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FASTATTN_DEVICE void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fastattn::cuda
