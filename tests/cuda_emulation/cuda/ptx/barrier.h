// In the place of csrc/cuda/ptx/barrier.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

inline void barrier(Where where = Where::here()) { emulation::barrier(0, 0, true, where); }
inline bool barrier_or(bool condition, Where where = Where::here()) { return emulation::barrier_or(condition, where); }
inline void named_barrier_sync(int id, int threads, Where where = Where::here()) {
    emulation::barrier(id, threads, true, where);
}
inline void named_barrier_arrive(int id, int threads, Where where = Where::here()) {
    emulation::barrier(id, threads, false, where);
}
inline void warp_barrier(Where where = Where::here()) { emulation::warp_barrier(where); }

}  // namespace fastattn::cuda
