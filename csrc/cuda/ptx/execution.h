// Threads, blocks, and what a kernel looks like.
//
// Kernels use nothing of CUDA but the headers of this folder, so that tests/cuda_emulation can put ordinary C++ of the
// same names in their place.
#pragma once

#include <cstdint>

#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_HOST_DEVICE __host__ __device__ __forceinline__
// FASTATTN_KERNEL(kThreads, kBlocks) name(FASTATTN_CONSTANT Params p): threads of a block, blocks of a multiprocessor
// that registers are to suffice for.
#define FASTATTN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// An argument of a kernel that stays in constant memory.
#define FASTATTN_CONSTANT const __grid_constant__

namespace fastattn::cuda {

// PTX ISA, "Special Registers": %tid, %ctaid, %nctaid. Blocks have one dimension.
FASTATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTATTN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
FASTATTN_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
FASTATTN_DEVICE int64_t block_index_y() { return static_cast<int64_t>(blockIdx.y); }
FASTATTN_DEVICE int64_t block_index_z() { return static_cast<int64_t>(blockIdx.z); }
FASTATTN_DEVICE int64_t grid_size() { return static_cast<int64_t>(gridDim.x); }

// The warp's number, as a value that the compiler knows to be the same in all lanes.
FASTATTN_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

}  // namespace fastattn::cuda
