// A value that the compiler does not see through.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// x, as if it could be anything: what is computed from it stays in the loop that asks for it. Addresses that differ by
// constants are cheaper to compute again than to keep in registers from one turn to the next.
FASTATTN_DEVICE uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
FASTATTN_DEVICE int opaque(int x) { return static_cast<int>(opaque(static_cast<uint32_t>(x))); }

}  // namespace fastattn::cuda
