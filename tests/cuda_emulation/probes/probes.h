// Probes: kernels of one block that put one wrapper's results where they can be looked at, bit for bit.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/execution.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/shared.h"

namespace fastattn::cuda::probes {

constexpr int kThreads = 128;  // a warpgroup; probes of warp instructions use the first warp

// Words in, words out. A probe knows how many it needs.
struct Buffers {
    const uint32_t* in;
    uint32_t* out;
    int64_t in_words, out_words;
};

using Probe = void (*)(const Buffers&, void* stream);

struct Entry {
    const char* name;
    Probe run;
};

// Shared memory = in, all of it, by all threads.
FASTATTN_DEVICE void fill_shared(const Buffers& p, uint32_t shared) {
    for (int n = thread_index(); n < p.in_words; n += kThreads) {
        store_shared(shared + 4 * static_cast<uint32_t>(n), load_global(p.in + n));
    }
    barrier();
}

// out = so many words of shared memory.
FASTATTN_DEVICE void dump_shared(const Buffers& p, uint32_t shared) {
    barrier();
    for (int n = thread_index(); n < p.out_words; n += kThreads) {
        store_global(p.out + n, load_shared<uint32_t>(shared + 4 * static_cast<uint32_t>(n)));
    }
}

template <void (*kKernel)(Buffers)>
void run(const Buffers& buffers, void* stream) {
    launch(kKernel, {1}, kThreads, 48 << 10, stream, buffers);
}

}  // namespace fastattn::cuda::probes
