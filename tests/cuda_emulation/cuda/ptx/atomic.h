// In the place of csrc/cuda/ptx/atomic.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

inline void reduce_add(float* p, float value, Where where = Where::here()) {
    emulation::reduce_add(p, &value, 1, where);
}
inline void reduce_add(float* p, float x, float y, Where where = Where::here()) {
    const float values[2] = {x, y};
    emulation::reduce_add(p, values, 2, where);
}
inline void reduce_add(float* p, float x, float y, float z, float w, Where where = Where::here()) {
    const float values[4] = {x, y, z, w};
    emulation::reduce_add(p, values, 4, where);
}
inline void reduce_add_release(int32_t* p, int32_t value, Where where = Where::here()) {
    emulation::atomic_add(p, value, emulation::Order::kRelease, where);
}
inline int32_t atomic_add(int32_t* p, int32_t value, Where where = Where::here()) {
    return emulation::atomic_add(p, value, emulation::Order::kRelaxed, where);
}
inline int32_t atomic_add_acq_rel(int32_t* p, int32_t value, Where where = Where::here()) {
    return emulation::atomic_add(p, value, emulation::Order::kAcquireRelease, where);
}
inline int32_t load_acquire(const int32_t* p, Where where = Where::here()) { return emulation::load_acquire(p, where); }
inline void store_release(int32_t* p, int32_t value, Where where = Where::here()) {
    emulation::store_release(p, value, where);
}
inline void wait_until_equal(const int32_t* p, int32_t value, Where where = Where::here()) {
    emulation::wait_until_equal(p, value, where);
}
inline void fence_gpu() { emulation::fence_gpu(); }

}  // namespace fastattn::cuda
