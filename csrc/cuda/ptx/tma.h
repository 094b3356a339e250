// The tensor memory accelerator: boxes of tensors and runs of bytes between global and shared memory; sm_90.
#pragma once

#include <cuda.h>

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// CUDA Driver API, "Tensor Map Object Management"; made by make_tensor_map (cuda/tensor_map.h). A kernel takes it as
// FASTATTN_CONSTANT.
using TensorMap = CUtensorMap;

FASTATTN_DEVICE void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor". One thread copies the box at these
// coordinates, the innermost first; what lies outside the tensor reads as 0. The bytes of the whole box count on the
// barrier. HAZARD: a shared memory tile that was last read or written by ordinary instructions needs fence_proxy_async.
FASTATTN_DEVICE void tma_load_4d(uint32_t shared, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2,
                                 int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// The other way; what lies outside the tensor is not written.
FASTATTN_DEVICE void tma_store_4d(const TensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                     reinterpret_cast<uint64_t>(&map)),
                 "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

// PTX ISA, "...: cp.reduce.async.bulk": global[n] += shared[n]; both aligned to 16, bytes a multiple of 16. Relaxed.
// HAZARD: the order of additions, and so the rounding, differs from run to run.
FASTATTN_DEVICE void bulk_reduce_add(float* global, uint32_t shared, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
                 "r"(shared), "r"(bytes)
                 : "memory");
}

// "...: cp.async.bulk.commit_group, wait_group": of this thread's stores and reductions at most kPending groups are in
// flight; with _read they may still be writing, but their shared memory is free.
FASTATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
FASTATTN_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
FASTATTN_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// PTX ISA, "...: fence.proxy.async": what this thread wrote to shared memory is seen by asynchronous copies and wgmma
// that are ordered after it.
FASTATTN_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace fastattn::cuda
