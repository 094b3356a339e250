// Bulk copies between global and shared memory (sm_90), issued by one thread and done by the TMA unit.
//
// Loads complete on an mbarrier, which counts their bytes; stores and reductions in groups of the thread that issued
// them. Shared memory is read and written through the async proxy: fence_proxy_async() after ordinary stores.
#pragma once

#include "cuda/ptx/tensor_map.h"

namespace fastattn::cuda {

// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor". Coordinates are in elements, dimension 0
// first; they may be negative or past the end. Shared addresses are multiples of 128 bytes, of 1024 with k128Bytes.
FASTATTN_DEVICE void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, int c0, int c1, int c2,
                              int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared),
        "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
FASTATTN_DEVICE void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, int c0, int c1, int c2, int c3,
                              int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2];" ::"r"(shared),
        "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}
FASTATTN_DEVICE void tma_store(const TensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
FASTATTN_DEVICE void tma_store(const TensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
                 "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

// "...: cp.reduce.async.bulk.tensor": adds to what is in global memory, element by element and relaxed.
FASTATTN_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
        "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// "...: cp.async.bulk": contiguous bytes, a multiple of 16, both addresses as well.
FASTATTN_DEVICE void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t mbarrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(mbarrier)
        : "memory");
}
FASTATTN_DEVICE void bulk_store(void* global, uint32_t shared, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
                 : "memory");
}

// "...: cp.reduce.async.bulk": the floats at shared are added to those at global, relaxed.
FASTATTN_DEVICE void bulk_reduce_add(float* global, uint32_t shared, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
                 "r"(shared), "r"(bytes)
                 : "memory");
}

// "...: cp.async.bulk.commit_group, cp.async.bulk.wait_group": until at most kPending of this thread's groups still
// read shared memory, or until they are done altogether.
FASTATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
FASTATTN_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
FASTATTN_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fastattn::cuda
