// In the place of csrc/cuda/ptx/simt.h: the CUDA execution model as ordinary C++.
//
// A CUDA thread is a fiber; one block runs at a time. The fibers of a warp run one after another until each waits at a
// shuffle or at a barrier, so what one thread writes without a barrier is seen by none of those before it: with
// FASTATTN_EMULATION_REVERSE set they run in the opposite order, and a missing barrier shows in one of the two.
// Shared memory starts as NaN bytes in every block.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "params.h"

#define FASTATTN_DEVICE inline
#define FASTATTN_KERNEL(name, threads, params) void name(const ::fastattn::AttentionParams params)
#define FASTATTN_SHARED(type, name) type& name = ::fastattn::cuda::emulation::this_block().shared<type>()

namespace fastattn::cuda::emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedMemory = 99 << 10;  // what a block can have on every architecture from sm_80 on

enum class State { kReady, kAtShuffle, kAtBarrier, kDone };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = State::kDone;
    float value = 0.f;  // given to a shuffle, then taken from it
    int mask = 0;
    bool condition = false;
};

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what);
    std::abort();
}

class Block {
public:
    using Kernel = void (*)(AttentionParams);

    int64_t index = 0;
    int current = 0;
    bool any = false;  // whether a thread's condition held at the last barrier

    void run(Kernel kernel, const AttentionParams& params, int64_t block_index, int threads) {
        index = block_index;
        kernel_ = kernel;
        params_ = &params;
        fibers_.resize(threads);
        std::memset(shared_.get(), 0xff, kSharedMemory);
        for (Fiber& fiber : fibers_) {
            fiber.state = State::kReady;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = &scheduler_;
            makecontext(&fiber.context, &Block::enter, 0);
        }
        const bool reverse = std::getenv("FASTATTN_EMULATION_REVERSE") != nullptr;
        const int warps = (threads + kWarp - 1) / kWarp;
        while (true) {
            for (int n = 0; n < warps; ++n) run_warp(reverse ? warps - 1 - n : n, reverse);
            int waiting = 0;
            any = false;
            for (const Fiber& fiber : fibers_) {
                waiting += fiber.state == State::kAtBarrier;
                any = any || (fiber.state == State::kAtBarrier && fiber.condition);
            }
            if (waiting == 0) return;
            if (waiting != threads) fail("a barrier that not all threads of the block reach");
            for (Fiber& fiber : fibers_) fiber.state = State::kReady;
        }
    }

    Fiber& fiber() { return fibers_[current]; }

    // Back to the scheduler, until what the state waits for has happened.
    void wait(State state) {
        Fiber& fiber = fibers_[current];
        fiber.state = state;
        swapcontext(&fiber.context, &scheduler_);
    }

    template <typename T>
    T& shared() {
        static_assert(sizeof(T) <= kSharedMemory);
        return *reinterpret_cast<T*>(shared_.get());
    }

private:
    struct alignas(128) Line {
        char bytes[128];
    };

    static void enter();

    // Runs a warp until all its threads are at a barrier or done.
    void run_warp(int warp, bool reverse) {
        const int begin = warp * kWarp, end = std::min<int>(begin + kWarp, static_cast<int>(fibers_.size()));
        while (true) {
            int shuffling = 0;
            for (int n = begin; n < end; ++n) {
                current = reverse ? begin + end - 1 - n : n;
                if (fiber().state == State::kReady) swapcontext(&scheduler_, &fiber().context);
                shuffling += fiber().state == State::kAtShuffle;
            }
            if (shuffling == 0) return;
            if (shuffling != kWarp) fail("a shuffle that not all lanes of the warp reach");
            float values[kWarp];
            for (int lane = 0; lane < kWarp; ++lane) values[lane] = fibers_[begin + lane].value;
            for (int lane = 0; lane < kWarp; ++lane) {
                Fiber& fiber = fibers_[begin + lane];
                fiber.value = values[lane ^ fiber.mask];
                fiber.state = State::kReady;
            }
        }
    }

    Kernel kernel_ = nullptr;
    const AttentionParams* params_ = nullptr;
    std::vector<Fiber> fibers_;
    ucontext_t scheduler_;
    std::unique_ptr<Line[]> shared_{new Line[kSharedMemory / sizeof(Line)]};
};

inline Block& this_block() {
    static thread_local Block block;
    return block;
}

inline void Block::enter() {
    Block& block = this_block();
    block.kernel_(*block.params_);
    block.fiber().state = State::kDone;
}

}  // namespace fastattn::cuda::emulation

namespace fastattn::cuda {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline int thread_index() { return emulation::this_block().current; }
inline int64_t block_index() { return emulation::this_block().index; }

inline bool barrier_or(bool condition) {
    emulation::this_block().fiber().condition = condition;
    emulation::this_block().wait(emulation::State::kAtBarrier);
    return emulation::this_block().any;
}
inline void barrier() { barrier_or(false); }

inline float shuffle_xor(float value, int mask) {
    emulation::Fiber& fiber = emulation::this_block().fiber();
    fiber.value = value;
    fiber.mask = mask;
    emulation::this_block().wait(emulation::State::kAtShuffle);
    return fiber.value;
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Half x) {
    _Float16 y;
    std::memcpy(&y, &x, sizeof y);
    return static_cast<float>(y);
}
inline float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, Half& y) {
    const _Float16 half = static_cast<_Float16>(x);
    std::memcpy(&y, &half, sizeof y);
}
inline void from_float(float x, BFloat16& y) {
    const uint32_t bits = float_bits(x);
    y.bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace fastattn::cuda
