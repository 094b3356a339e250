// In the place of csrc/cuda/ptx/mbarrier.h: the same names on the emulator.
#pragma once

#include "cuda/ptx/execution.h"
#include "emulator/hopper.h"

namespace fastattn::cuda {

inline void mbarrier_init(uint32_t address, int count, Where where = Where::here()) {
    emulation::mbarrier_init(address, count, where);
}
inline void fence_mbarrier_init() { emulation::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint32_t address, Where where = Where::here()) {
    emulation::mbarrier_arrive(address, 0, where);
}
inline void mbarrier_arrive_expect_tx(uint32_t address, int bytes, Where where = Where::here()) {
    emulation::mbarrier_arrive(address, bytes, where);
}
inline bool mbarrier_try_wait(uint32_t address, int parity, Where where = Where::here()) {
    return emulation::mbarrier_try_wait(address, parity, where);
}
inline void mbarrier_wait(uint32_t address, int parity, Where where = Where::here()) {
    emulation::mbarrier_wait(address, parity, where);
}
inline void fence_proxy_async() { emulation::fence_proxy_async(); }

}  // namespace fastattn::cuda
