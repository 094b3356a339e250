// Small kernels, each right or with one fault that the emulator must notice; for emulation only. in: 512 words; out: as
// many, which nothing has written.
#include <cstring>
#include <exception>
#include <string>

#include "cuda/ptx/atomic.h"
#include "cuda/ptx/bulk_copy.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/shuffle.h"
#include "cuda/ptx/wgmma.h"
#include "probes/probes.h"

namespace fastattn::cuda::probes {
namespace {

uint32_t word(int n) { return smem_base() + 4 * static_cast<uint32_t>(n); }
void put(const Buffers& p, uint32_t value) { store_global(p.out + thread_index(), value); }

template <bool kFault>
void barrier_missing(Buffers p) {
    store_shared(word(thread_index()), load_global(p.in + thread_index()));
    if (!kFault) barrier();
    put(p, load_shared<uint32_t>(word(thread_index() ^ 32)));
}
template <bool kFault>
void warp_barrier_missing(Buffers p) {
    store_shared(word(thread_index()), load_global(p.in + thread_index()));
    if (!kFault) warp_barrier();
    put(p, load_shared<uint32_t>(word(thread_index() ^ 1)));
}
// The second round overwrites what another warp may still be reading.
template <bool kFault>
void overwritten(Buffers p) {
    uint32_t sum = 0;
    for (int round = 0; round < 2; ++round) {
        store_shared(word(thread_index()), load_global(p.in + round * kThreads + thread_index()));
        barrier();
        sum += load_shared<uint32_t>(word(thread_index() ^ 64));
        if (!kFault) barrier();
    }
    put(p, sum);
}
template <bool kFault>
void unwritten(Buffers p) {
    if (!kFault || thread_index() != 40) store_shared(word(thread_index()), 1u);
    barrier();
    put(p, load_shared<uint32_t>(word(thread_index() ^ 32)));
}
template <bool kFault>
void copy_not_awaited(Buffers p) {
    cp_async<4>(word(thread_index()), p.in + thread_index());
    cp_async_commit();
    cp_async<4>(word(kThreads + thread_index()), p.in + thread_index());
    cp_async_commit();
    cp_async_wait<kFault ? 2 : 1>();
    barrier();
    put(p, load_shared<uint32_t>(word(thread_index() ^ 32)));
    cp_async_wait<0>();
}
template <bool kFault>
void copy_without_barrier(Buffers p) {
    cp_async<4>(word(thread_index()), p.in + thread_index());
    cp_async_commit();
    cp_async_wait<0>();
    if (!kFault) barrier();
    put(p, load_shared<uint32_t>(word(thread_index() ^ 32)));
}
template <bool kFault>
void copy_not_committed(Buffers p) {
    cp_async<4>(word(thread_index()), p.in + thread_index());
    if (!kFault) cp_async_commit();
    cp_async_wait<0>();
}
template <bool kFault>
void shared_bounds(Buffers) {
    if (thread_index() == 0) store_shared(smem_base() + (48 << 10) - (kFault ? 8 : 16), Words4{});
}
template <bool kFault>
void shared_alignment(Buffers) {
    if (thread_index() == 0) store_shared(word(kFault ? 2 : 4), Words4{});
}
template <bool kFault>
void global_bounds(Buffers p) {
    load_global(p.in + p.in_words - (kFault ? 0 : 1));
}
template <bool kFault>
void global_alignment(Buffers p) {
    load_global(reinterpret_cast<const Words4*>(p.in + (kFault ? 1 : 4)));
}
template <bool kFault>
void input_written(Buffers p) {
    if (thread_index() == 0) store_global(kFault ? const_cast<uint32_t*>(p.in) : p.out, 1u);
}
template <bool kFault>
void output_read(Buffers p) {
    if (!kFault) put(p, 1u);
    load_global(p.out + thread_index());
}
template <bool kFault>
void barrier_count(Buffers) {
    if (thread_index() < 64) named_barrier_sync(3, kFault ? 96 : 64);
}
template <bool kFault>
void lanes_missing(Buffers p) {
    uint32_t x = load_global(p.in + thread_index());
    if (!kFault || lane_index() < 16) x += shuffle_xor(x, 1);
    put(p, x);
}
template <bool kFault>
void lanes_disagree(Buffers p) {
    uint32_t x = load_global(p.in + thread_index());
    if (kFault && lane_index() == 3) {
        x += shuffle_xor(x, 2);
    } else {
        x += shuffle_xor(x, 1);
    }
    put(p, x);
}
// Of what a barrier was promised nobody ever makes use.
template <bool kFault>
void barrier_left(Buffers) {
    if (thread_index() < 64) named_barrier_arrive(3, 128);
    if (!kFault && thread_index() >= 64) named_barrier_sync(3, 128);
}
template <bool kFault>
void barrier_disagree(Buffers) {
    named_barrier_sync(3, kFault && thread_index() >= 64 ? 64 : kThreads);
}
template <bool kFault>
void matrix_bounds(Buffers p) {
    fill_shared(p, smem_base());
    uint32_t r[4];
    const uint32_t end = smem_base() + (48 << 10) - 512 + (kFault ? 16 : 0);
    if (thread_index() < 32) {
        for (int n = 0; n < 4; ++n) store_shared(end + 16 * lane_index() - (kFault ? 16 : 0) + 4 * n, 0u);
        warp_barrier();
        ldmatrix_x4(r, end + 16 * lane_index());
    }
}
template <bool kFault>
void copy_alignment(Buffers p) {
    cp_async<16>(word(4 * thread_index()), p.in + 4 * thread_index() + (kFault && thread_index() == 5 ? 1 : 0), true);
    cp_async_commit();
    cp_async_wait<0>();
}
// Two warps of one block, by way of global memory.
template <bool kFault>
void warps_race(Buffers p) {
    put(p, 1u);
    if (!kFault) barrier();
    put({p.in, p.out + (thread_index() ^ 32) - thread_index(), p.in_words, p.out_words}, 2u);
}

// Two blocks.
template <bool kFault>
void blocks_race(Buffers p) {
    if (thread_index() == 0) store_global(p.out + (kFault ? 0 : block_index()), 1u);
}
// Block 1 reads what block 0 wrote, once it has been told. out: message, flag; zero at first.
template <bool kFault>
void message(Buffers p) {
    auto* flag = reinterpret_cast<int32_t*>(p.out + 1);
    if (thread_index() != 0) return;
    if (block_index() == 0) {
        store_global(p.out, 7u);
        kFault ? static_cast<void>(atomic_add(flag, 1)) : reduce_add_release(flag, 1);
    } else {
        wait_until_equal(flag, 1);
        store_global(p.out + 2, load_global(p.out));
    }
}
// The same with a relaxed operation after a fence.
template <bool kFault>
void fenced_message(Buffers p) {
    auto* flag = reinterpret_cast<int32_t*>(p.out + 1);
    if (block_index() == 0) {
        store_global(p.out + 8 + thread_index(), 7u);
        barrier();
        if (thread_index() == 0) {
            if (!kFault) fence_gpu();
            atomic_add(flag, 1);
        }
    } else if (thread_index() == 0) {
        wait_until_equal(flag, 1);
        store_global(p.out + 2, load_global(p.out + 8 + 70));
    }
}
// Each block waits for its turn; with the fault, for a turn that never comes.
template <bool kFault>
void turns(Buffers p) {
    auto* turn = reinterpret_cast<int32_t*>(p.out);
    if (thread_index() != 0) return;
    wait_until_equal(turn, static_cast<int32_t>(block_index() + (kFault ? 1 : 0)));
    store_release(turn, static_cast<int32_t>(block_index()) + 1);
}
template <bool kFault>
void atomic_and_store(Buffers p) {
    auto* sum = reinterpret_cast<float*>(p.out);
    if (thread_index() != 0) return;
    if (kFault && block_index() == 1) {
        store_global(sum, 1.f);
    } else {
        reduce_add(sum, 1.f);
    }
}

// Hopper.
constexpr uint32_t kBar = 40 << 10;
void init(bool fence = true) {
    if (thread_index() == 0) {
        mbarrier_init(smem_base() + kBar, 1);
        if (fence) fence_mbarrier_init();
    }
    barrier();
}
void load_1024(const Buffers& p) {
    if (thread_index() != 0) return;
    mbarrier_arrive_expect_tx(smem_base() + kBar, 1024);
    bulk_load(smem_base(), p.in, 1024, smem_base() + kBar);
}
template <bool kFault>
void load_not_awaited(Buffers p) {
    init();
    load_1024(p);
    if (!kFault || thread_index() < 32) mbarrier_wait(smem_base() + kBar, 0);
    put(p, load_shared<uint32_t>(word(thread_index())));
}
template <bool kFault>
void wrong_parity(Buffers p) {
    init();
    load_1024(p);
    mbarrier_wait(smem_base() + kBar, 0);
    barrier();
    if (thread_index() == 0) mbarrier_arrive(smem_base() + kBar);
    mbarrier_wait(smem_base() + kBar, kFault ? 0 : 1);
    if (kFault) mbarrier_wait(smem_base() + kBar, 0);
    put(p, load_shared<uint32_t>(word(thread_index())));
}
template <bool kFault>
void wrong_bytes(Buffers p) {
    init();
    if (thread_index() == 0) {
        mbarrier_arrive_expect_tx(smem_base() + kBar, kFault ? 2048 : 1024);
        bulk_load(smem_base(), p.in, 1024, smem_base() + kBar);
    }
    mbarrier_wait(smem_base() + kBar, 0);
}
template <bool kFault>
void init_not_fenced(Buffers p) {
    init(!kFault);
    load_1024(p);
    mbarrier_wait(smem_base() + kBar, 0);
}
template <bool kFault>
void proxy_not_fenced(Buffers p) {
    store_shared(word(thread_index()), load_global(p.in + thread_index()));
    if (!kFault) fence_proxy_async();
    barrier();
    if (thread_index() == 0) {
        bulk_store(p.out, smem_base(), 4 * kThreads);
        bulk_commit();
        bulk_wait<0>();
    }
}
template <bool kFault>
void store_source_overwritten(Buffers p) {
    store_shared(word(thread_index()), load_global(p.in + thread_index()));
    fence_proxy_async();
    barrier();
    if (thread_index() == 0) {
        bulk_store(p.out, smem_base(), 4 * kThreads);
        bulk_commit();
        if (!kFault) bulk_wait_read<0>();
        store_shared(word(0), 1u);
        bulk_wait<0>();
    }
}
template <bool kFault>
void store_not_awaited(Buffers p) {
    store_shared(word(thread_index()), load_global(p.in + thread_index()));
    fence_proxy_async();
    barrier();
    if (thread_index() == 0) {
        bulk_store(p.out, smem_base(), 4 * kThreads);
        bulk_commit();
        if (!kFault) bulk_wait<0>();
    }
}
template <bool kFault>
void too_many_arrivals(Buffers p) {
    init();
    if (thread_index() == 0) {
        mbarrier_arrive_expect_tx(smem_base() + kBar, 16);
        if (kFault) mbarrier_arrive(smem_base() + kBar);
        bulk_load(smem_base(), p.in, 16, smem_base() + kBar);
    }
    mbarrier_wait(smem_base() + kBar, 0);
}
template <bool kFault>
void mbarrier_overwritten(Buffers) {
    init();
    if (kFault && thread_index() == 0) store_shared(smem_base() + kBar, 0u);
    if (thread_index() == 0) mbarrier_arrive(smem_base() + kBar);
}
enum class Wgmma { kNone, kTouched, kFragment, kNoFence, kNoWait, kOverwritten, kBounds, kDisagree };
template <Wgmma kFault>
void wgmma_kernel(Buffers) {
    constexpr int kWords = kFault == Wgmma::kBounds ? 12 << 10 : 64 * 32;
    for (int n = thread_index(); n < kWords; n += kThreads) store_shared(word(n), 0x3c003c00u);
    fence_proxy_async();
    barrier();
    float d[32];
    uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    for (float& x : d) x = 0.f;
    if (kFault != Wgmma::kNoFence) wgmma_fence(d);
    const uint32_t b = smem_base() + (kFault == Wgmma::kBounds ? 47 << 10 : 0);
    wgmma_rs<Half, 64>(d, a, descriptor_128(b, 16, 1024), kFault != Wgmma::kDisagree || thread_index() >= 32);
    wgmma_commit();
    if (kFault == Wgmma::kOverwritten) store_shared(word(0), 0u);
    if (kFault == Wgmma::kTouched) d[5] += 1.f;
    if (kFault == Wgmma::kFragment) a[2] = 0;
    if (kFault != Wgmma::kNoWait) wgmma_wait<0>(d);
}
template <bool kFault>
void registers(Buffers) {
    if (kFault) {
        setmaxnreg_decrease<24>();
        setmaxnreg_decrease<32>();
    } else {
        setmaxnreg_decrease<24>();
    }
}
// Not a fault but a cost: the rows of a matrix in one bank, or spread by the swizzle.
template <bool kFault>
void banks(Buffers p) {
    fill_shared(p, smem_base());
    uint32_t r[4];
    const uint32_t row =
        smem_base() + 128 * static_cast<uint32_t>(lane_index() % 8) + 16 * static_cast<uint32_t>(lane_index() / 8);
    if (thread_index() < 32) ldmatrix_x4(r, kFault ? row : swizzle_128(row));
    load_shared<uint32_t>(word(kFault ? lane_index() * 8 : lane_index()));
}

using Kernel = void (*)(Buffers);
struct Fault {
    const char* name;
    int64_t blocks;
    Kernel right, wrong;
};

#define FASTATTN_FAULT(name, blocks) {#name, blocks, name<false>, name<true>}
constexpr Fault kFaults[] = {
    FASTATTN_FAULT(barrier_missing, 1),
    FASTATTN_FAULT(warp_barrier_missing, 1),
    FASTATTN_FAULT(overwritten, 1),
    FASTATTN_FAULT(unwritten, 1),
    FASTATTN_FAULT(copy_not_awaited, 1),
    FASTATTN_FAULT(copy_without_barrier, 1),
    FASTATTN_FAULT(copy_not_committed, 1),
    FASTATTN_FAULT(shared_bounds, 1),
    FASTATTN_FAULT(shared_alignment, 1),
    FASTATTN_FAULT(global_bounds, 1),
    FASTATTN_FAULT(global_alignment, 1),
    FASTATTN_FAULT(input_written, 1),
    FASTATTN_FAULT(output_read, 1),
    FASTATTN_FAULT(barrier_count, 1),
    FASTATTN_FAULT(lanes_missing, 1),
    FASTATTN_FAULT(lanes_disagree, 1),
    FASTATTN_FAULT(barrier_left, 1),
    FASTATTN_FAULT(barrier_disagree, 1),
    FASTATTN_FAULT(matrix_bounds, 1),
    FASTATTN_FAULT(copy_alignment, 1),
    FASTATTN_FAULT(warps_race, 1),
    FASTATTN_FAULT(blocks_race, 2),
    FASTATTN_FAULT(message, 2),
    FASTATTN_FAULT(fenced_message, 2),
    FASTATTN_FAULT(turns, 7),
    FASTATTN_FAULT(atomic_and_store, 3),
    FASTATTN_FAULT(load_not_awaited, 1),
    FASTATTN_FAULT(wrong_parity, 1),
    FASTATTN_FAULT(wrong_bytes, 1),
    FASTATTN_FAULT(too_many_arrivals, 1),
    FASTATTN_FAULT(mbarrier_overwritten, 1),
    FASTATTN_FAULT(init_not_fenced, 1),
    FASTATTN_FAULT(proxy_not_fenced, 1),
    FASTATTN_FAULT(store_source_overwritten, 1),
    FASTATTN_FAULT(store_not_awaited, 1),
    {"wgmma_touched", 1, wgmma_kernel<Wgmma::kNone>, wgmma_kernel<Wgmma::kTouched>},
    {"wgmma_fragment", 1, wgmma_kernel<Wgmma::kNone>, wgmma_kernel<Wgmma::kFragment>},
    {"wgmma_no_fence", 1, wgmma_kernel<Wgmma::kNone>, wgmma_kernel<Wgmma::kNoFence>},
    {"wgmma_no_wait", 1, wgmma_kernel<Wgmma::kNone>, wgmma_kernel<Wgmma::kNoWait>},
    {"wgmma_source_overwritten", 1, wgmma_kernel<Wgmma::kNone>, wgmma_kernel<Wgmma::kOverwritten>},
    {"wgmma_bounds", 1, wgmma_kernel<Wgmma::kNone>, wgmma_kernel<Wgmma::kBounds>},
    {"wgmma_disagree", 1, wgmma_kernel<Wgmma::kNone>, wgmma_kernel<Wgmma::kDisagree>},
    FASTATTN_FAULT(registers, 1),
    FASTATTN_FAULT(banks, 1),
};

}  // namespace
}  // namespace fastattn::cuda::probes

// Runs a kernel with or without its fault; null, or what the emulator says.
extern "C" __attribute__((visibility("default"))) const char* fastattn_fault(const char* name, int wrong,
                                                                             const uint32_t* in, uint32_t* out) {
    namespace probes = fastattn::cuda::probes;
    static std::string error;
    try {
        for (const auto& fault : probes::kFaults) {
            if (std::strcmp(fault.name, name)) continue;
            const probes::Buffers buffers{in, out, 512, 512};
            fastattn::cuda::launch(wrong ? fault.wrong : fault.right, {fault.blocks}, probes::kThreads, 48 << 10,
                                   nullptr, buffers);
            return nullptr;
        }
        error = std::string("no fault called ") + name;
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}
