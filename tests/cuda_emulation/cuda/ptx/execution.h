// In the place of csrc/cuda/ptx/execution.h: the same names on the emulator.
#pragma once

#include <cstdint>

#include "emulator/api.h"

#define FASTATTN_DEVICE inline
#define FASTATTN_HOST_DEVICE inline
#define FASTATTN_KERNEL(threads, blocks) void
#define FASTATTN_CONSTANT const

namespace fastattn::cuda {

using emulation::Where;

inline int thread_index() { return emulation::thread_index(); }
inline int lane_index() { return emulation::thread_index() % 32; }
inline int warp_index() { return emulation::thread_index() / 32; }
inline int64_t block_index() { return emulation::block_index(0); }
inline int64_t block_index_y() { return emulation::block_index(1); }
inline int64_t block_index_z() { return emulation::block_index(2); }
inline int64_t grid_size() { return emulation::grid_size(); }

}  // namespace fastattn::cuda
