// In the place of csrc/cuda/ptx/wgmma.h: the same names on the emulator.
#pragma once

#include <type_traits>

#include "cuda/ptx/descriptor.h"
#include "cuda/ptx/e4m3.h"
#include "emulator/hopper.h"

namespace fastattn::cuda {

template <int R>
void pin_registers(float (&)[R]) {}

inline void wgmma_commit(Where where = Where::here()) { emulation::wgmma_commit(where); }

// Any number of accumulators; up to three here, for the default argument.
inline void wgmma_fence(Where where = Where::here()) { emulation::wgmma_fence(where); }
template <int A>
void wgmma_fence(float (&)[A], Where where = Where::here()) {
    emulation::wgmma_fence(where);
}
template <int A, int B>
void wgmma_fence(float (&)[A], float (&)[B], Where where = Where::here()) {
    emulation::wgmma_fence(where);
}
template <int A, int B, int C>
void wgmma_fence(float (&)[A], float (&)[B], float (&)[C], Where where = Where::here()) {
    emulation::wgmma_fence(where);
}
template <int kPending>
void wgmma_wait(Where where = Where::here()) {
    emulation::wgmma_wait(kPending, where);
}
template <int kPending, int A>
void wgmma_wait(float (&)[A], Where where = Where::here()) {
    emulation::wgmma_wait(kPending, where);
}
template <int kPending, int A, int B>
void wgmma_wait(float (&)[A], float (&)[B], Where where = Where::here()) {
    emulation::wgmma_wait(kPending, where);
}
template <int kPending, int A, int B, int C>
void wgmma_wait(float (&)[A], float (&)[B], float (&)[C], Where where = Where::here()) {
    emulation::wgmma_wait(kPending, where);
}

template <typename T>
constexpr emulation::Element wgmma_element() {
    if (std::is_same_v<T, E4M3>) return emulation::Element::kE4M3;
    return std::is_same_v<T, BFloat16> ? emulation::Element::kBFloat16 : emulation::Element::kFloat16;
}

template <typename T, int N, bool kTransposeA = false, bool kTransposeB = false>
void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Where where = Where::here()) {
    static_assert(N % 16 == 0 && 16 <= N && N <= 256);
    emulation::wgmma({d, N, nullptr, a, b, wgmma_element<T>(), kTransposeA, kTransposeB, accumulate}, where);
}
template <typename T, int N, bool kTransposeB = false>
void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, Where where = Where::here()) {
    static_assert(N % 16 == 0 && 16 <= N && N <= 256);
    emulation::wgmma({d, N, a, 0, b, wgmma_element<T>(), false, kTransposeB, accumulate}, where);
}

}  // namespace fastattn::cuda
