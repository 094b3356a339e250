// In the place of csrc/cuda/ptx/bulk_copy.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/tensor_map.h"

namespace fastattn::cuda {

namespace emulation {
inline void check_rank(const TensorMap& map, int rank, Where where) {
    if (map.rank != rank) fail_rank(map.rank, rank, where);
}
}  // namespace emulation

inline void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, int c0, int c1, int c2, int c3,
                     Where where = Where::here()) {
    emulation::check_rank(map, 4, where);
    emulation::tma_load(shared, map, mbarrier, {c0, c1, c2, c3, 0}, where);
}
inline void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, int c0, int c1, int c2, int c3, int c4,
                     Where where = Where::here()) {
    emulation::check_rank(map, 5, where);
    emulation::tma_load(shared, map, mbarrier, {c0, c1, c2, c3, c4}, where);
}
inline void tma_store(const TensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3,
                      Where where = Where::here()) {
    emulation::check_rank(map, 4, where);
    emulation::tma_store(map, shared, {c0, c1, c2, c3, 0}, false, where);
}
inline void tma_store(const TensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3, int c4,
                      Where where = Where::here()) {
    emulation::check_rank(map, 5, where);
    emulation::tma_store(map, shared, {c0, c1, c2, c3, c4}, false, where);
}
inline void tma_reduce_add(const TensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3,
                           Where where = Where::here()) {
    emulation::check_rank(map, 4, where);
    emulation::tma_store(map, shared, {c0, c1, c2, c3, 0}, true, where);
}
inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t mbarrier, Where where = Where::here()) {
    emulation::bulk_load(shared, global, bytes, mbarrier, where);
}
inline void bulk_store(void* global, uint32_t shared, int bytes, Where where = Where::here()) {
    emulation::bulk_store(global, shared, bytes, false, where);
}
inline void bulk_reduce_add(float* global, uint32_t shared, int bytes, Where where = Where::here()) {
    emulation::bulk_store(global, shared, bytes, true, where);
}
inline void bulk_commit(Where where = Where::here()) { emulation::bulk_commit(where); }
template <int kPending>
void bulk_wait_read(Where where = Where::here()) {
    emulation::bulk_wait(kPending, true, where);
}
template <int kPending>
void bulk_wait(Where where = Where::here()) {
    emulation::bulk_wait(kPending, false, where);
}

}  // namespace fastattn::cuda
