// In the place of csrc/cuda/ptx/cp_async.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

template <int kBytes>
void cp_async(uint32_t shared, const void* global, bool valid = true, Where where = Where::here()) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
    emulation::cp_async(shared, global, kBytes, valid, where);
}
inline void cp_async_commit(Where where = Where::here()) { emulation::cp_async_commit(where); }
template <int kPending>
void cp_async_wait(Where where = Where::here()) {
    emulation::cp_async_wait(kPending, where);
}

}  // namespace fastattn::cuda
