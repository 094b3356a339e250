// Probes of the wrappers that every GPU from sm_80 on has.
#include <cstring>

#include "cuda/ptx/arithmetic.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shuffle.h"
#include "probes/probes.h"

namespace fastattn::cuda::probes {
namespace {

// out[n] = f(in[n]) for floats.
enum class Function { kExp2, kLog2, kReciprocal, kTanh };
template <Function f>
FASTATTN_KERNEL(kThreads, 1)
function_kernel(FASTATTN_CONSTANT Buffers p) {
    for (int n = thread_index(); n < p.out_words; n += kThreads) {
        const float x = bits_float(load_global(p.in + n));
        const float y = f == Function::kExp2         ? exp2_approx(x)
                        : f == Function::kLog2       ? log2_approx(x)
                        : f == Function::kReciprocal ? reciprocal_approx(x)
                                                     : tanh_approx(x);
        store_global(p.out + n, float_bits(y));
    }
}

// out[n] = pack(in[2 n], in[2 n + 1]).
template <typename T>
FASTATTN_KERNEL(kThreads, 1)
pack_kernel(FASTATTN_CONSTANT Buffers p) {
    for (int n = thread_index(); n < p.out_words; n += kThreads) {
        const uint32_t packed =
            pack<T>(bits_float(load_global(p.in + 2 * n)), bits_float(load_global(p.in + 2 * n + 1)));
        store_global(p.out + n, packed);
    }
}

// out[2 n], out[2 n + 1] = unpack(in[n]).
template <typename T>
FASTATTN_KERNEL(kThreads, 1)
unpack_kernel(FASTATTN_CONSTANT Buffers p) {
    for (int n = thread_index(); n < p.in_words; n += kThreads) {
        const Float2 x = unpack<T>(load_global(p.in + n));
        store_global(p.out + 2 * n, float_bits(x.x));
        store_global(p.out + 2 * n + 1, float_bits(x.y));
    }
}

// out[n] = the upper half of in[2 n] * in[2 n + 1].
FASTATTN_KERNEL(kThreads, 1)
multiply_high_kernel(FASTATTN_CONSTANT Buffers p) {
    for (int n = thread_index(); n < p.out_words; n += kThreads) {
        store_global(p.out + n, multiply_high(load_global(p.in + 2 * n), load_global(p.in + 2 * n + 1)));
    }
}

// out[n] = in[n], rounded to 16 bits.
template <typename T>
FASTATTN_KERNEL(kThreads, 1)
round_kernel(FASTATTN_CONSTANT Buffers p) {
    for (int n = thread_index(); n < p.out_words; n += kThreads) {
        T rounded;
        from_float(bits_float(load_global(p.in + n)), rounded);
        store_global(p.out + n, static_cast<uint32_t>(rounded.bits));
    }
}

// out[thread]: whether a word of in is 1 for any thread of the block, 2 for any thread, 1 for any lane of the warp, and
// the warp's number.
FASTATTN_KERNEL(kThreads, 1)
vote_kernel(FASTATTN_CONSTANT Buffers p) {
    const uint32_t x = load_global(p.in + thread_index());
    const uint32_t one = barrier_or(x == 1) ? 1u : 0u, two = barrier_or(x == 2) ? 2u : 0u;
    const uint32_t near = any_lane(x == 1) ? 4u : 0u;
    store_global(p.out + thread_index(), one | two | near | static_cast<uint32_t>(warp_index()) << 3);
}

// out: 32 words for each of shuffle_xor 1, 2, 4, 8, 16, shuffle from 0, 13, and from 31 - lane; ballot of the odd ones.
FASTATTN_KERNEL(kThreads, 1)
shuffle_kernel(FASTATTN_CONSTANT Buffers p) {
    if (thread_index() >= 32) return;
    const int lane = lane_index();
    const uint32_t x = load_global(p.in + lane);
#pragma unroll
    for (int n = 0; n < 5; ++n) store_global(p.out + 32 * n + lane, shuffle_xor(x, 1 << n));
    store_global(p.out + 32 * 5 + lane, shuffle(x, 0));
    store_global(p.out + 32 * 6 + lane, shuffle(x, 13));
    store_global(p.out + 32 * 7 + lane, shuffle(x, 31 - lane));
    store_global(p.out + 32 * 8 + lane, warp_ballot(x % 2 == 1));
}

// in: matrices of 8 rows of 16 bytes. out: register m of lane l at 32 m + l.
template <int kCount, bool kTransposed>
FASTATTN_KERNEL(kThreads, 1)
ldmatrix_kernel(FASTATTN_CONSTANT Buffers p) {
    const uint32_t shared = smem_base();
    fill_shared(p, shared);
    if (thread_index() >= 32) return;
    const int lane = lane_index();
    const uint32_t row = shared + 16 * static_cast<uint32_t>(lane % (8 * kCount));
    uint32_t r[kCount];
    if constexpr (kCount == 1 && !kTransposed) ldmatrix_x1(r, row);
    if constexpr (kCount == 2 && !kTransposed) ldmatrix_x2(r, row);
    if constexpr (kCount == 4 && !kTransposed) ldmatrix_x4(r, row);
    if constexpr (kCount == 1 && kTransposed) ldmatrix_x1_trans(r, row);
    if constexpr (kCount == 2 && kTransposed) ldmatrix_x2_trans(r, row);
    if constexpr (kCount == 4 && kTransposed) ldmatrix_x4_trans(r, row);
#pragma unroll
    for (int m = 0; m < kCount; ++m) store_global(p.out + 32 * m + lane, r[m]);
}

// in: a (4), b (2), d (4) of each lane, lane by lane. out: d.
template <typename T>
FASTATTN_KERNEL(kThreads, 1)
mma_kernel(FASTATTN_CONSTANT Buffers p) {
    if (thread_index() >= 32) return;
    const uint32_t* in = p.in + 10 * lane_index();
    uint32_t a[4];
    float d[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) a[n] = load_global(in + n);
    const uint32_t b0 = load_global(in + 4), b1 = load_global(in + 5);
#pragma unroll
    for (int n = 0; n < 4; ++n) d[n] = bits_float(load_global(in + 6 + n));
    mma_m16n8k16<T>(d, a, b0, b1);
#pragma unroll
    for (int n = 0; n < 4; ++n) store_global(p.out + 4 * lane_index() + n, float_bits(d[n]));
}

// out = in, copied kBytes at a time, with zeros in every third place.
template <int kBytes>
FASTATTN_KERNEL(kThreads, 1)
cp_async_kernel(FASTATTN_CONSTANT Buffers p) {
    const uint32_t shared = smem_base();
    constexpr int kWords = kBytes / 4;
    for (int n = thread_index(); n < p.in_words / kWords; n += kThreads) {
        cp_async<kBytes>(shared + static_cast<uint32_t>(n * kBytes), p.in + n * kWords, n % 3 != 1);
    }
    cp_async_commit();
    cp_async_wait<0>();
    dump_shared(p, shared);
}

// out: the words of in, each of 1, 2, 4, 8, 16 bytes at a time through shared memory in another order.
template <typename T>
FASTATTN_DEVICE void through_shared(const Buffers& p, uint32_t shared) {
    const int count = static_cast<int>(p.in_words * 4 / static_cast<int64_t>(sizeof(T)));
    for (int n = thread_index(); n < count; n += kThreads) {
        const uint32_t to = shared + static_cast<uint32_t>(sizeof(T)) * static_cast<uint32_t>(count - 1 - n);
        store_shared(to, load_global(reinterpret_cast<const T*>(p.in) + n));
    }
    barrier();
    for (int n = thread_index(); n < count; n += kThreads) {
        const uint32_t from = shared + static_cast<uint32_t>(sizeof(T)) * static_cast<uint32_t>(n);
        store_global(reinterpret_cast<T*>(p.out) + n, load_shared<T>(from));
    }
}
template <typename T>
FASTATTN_KERNEL(kThreads, 1)
shared_kernel(FASTATTN_CONSTANT Buffers p) {
    through_shared<T>(p, smem_base());
}

// out = in, by way of the read-only cache.
template <typename T>
FASTATTN_KERNEL(kThreads, 1)
constant_kernel(FASTATTN_CONSTANT Buffers p) {
    const int count = static_cast<int>(p.in_words * 4 / static_cast<int64_t>(sizeof(T)));
    for (int n = thread_index(); n < count; n += kThreads) {
        store_global(reinterpret_cast<T*>(p.out) + n, load_global_constant(reinterpret_cast<const T*>(p.in) + n));
    }
}

// Threads of different warps hand on out[0], in[0] at first: a release, an atomic addition of both, an acquire. out: 3
// more, what the addition found, what the last one read.
FASTATTN_KERNEL(kThreads, 1)
message_kernel(FASTATTN_CONSTANT Buffers p) {
    auto* word = reinterpret_cast<int32_t*>(p.out);
    const auto start = static_cast<int32_t>(load_global(p.in));
    if (thread_index() == 0) store_global(word, start - 1);
    barrier();
    if (thread_index() == 0) store_release(word, start);
    if (thread_index() == 32) {
        wait_until_equal(word, start);
        store_global(word + 1, atomic_add_acq_rel(word, 2));
        fence_gpu();
        reduce_add_release(word, 1);
    }
    barrier();
    if (thread_index() == 64) store_global(word + 2, load_acquire(word));
}

// out: the four floats of in with what all threads add, how many threads there are, and 1 from who counted last.
FASTATTN_KERNEL(kThreads, 1)
atomic_kernel(FASTATTN_CONSTANT Buffers p) {
    float* sum = reinterpret_cast<float*>(p.out);
    int32_t* count = reinterpret_cast<int32_t*>(p.out) + 4;
    if (thread_index() == 0) {
        for (int n = 0; n < 4; ++n) store_global(sum + n, bits_float(load_global(p.in + n)));
        store_global(count, 0);
    }
    barrier();
    reduce_add(sum, 1.f, 2.f, 3.f, 4.f);
    reduce_add(sum, 8.f);
    if (atomic_add(count, 1) == kThreads - 1) store_global(count + 1, 1);
}

}  // namespace

extern const Entry kSm80[] = {
    {"exp2", run<function_kernel<Function::kExp2>>},
    {"log2", run<function_kernel<Function::kLog2>>},
    {"reciprocal", run<function_kernel<Function::kReciprocal>>},
    {"tanh", run<function_kernel<Function::kTanh>>},
    {"pack_half", run<pack_kernel<Half>>},
    {"pack_bfloat16", run<pack_kernel<BFloat16>>},
    {"unpack_half", run<unpack_kernel<Half>>},
    {"unpack_bfloat16", run<unpack_kernel<BFloat16>>},
    {"multiply_high", run<multiply_high_kernel>},
    {"round_half", run<round_kernel<Half>>},
    {"round_bfloat16", run<round_kernel<BFloat16>>},
    {"vote", run<vote_kernel>},
    {"shuffle", run<shuffle_kernel>},
    {"ldmatrix_x1", run<ldmatrix_kernel<1, false>>},
    {"ldmatrix_x2", run<ldmatrix_kernel<2, false>>},
    {"ldmatrix_x4", run<ldmatrix_kernel<4, false>>},
    {"ldmatrix_x1_trans", run<ldmatrix_kernel<1, true>>},
    {"ldmatrix_x2_trans", run<ldmatrix_kernel<2, true>>},
    {"ldmatrix_x4_trans", run<ldmatrix_kernel<4, true>>},
    {"mma_half", run<mma_kernel<Half>>},
    {"mma_bfloat16", run<mma_kernel<BFloat16>>},
    {"cp_async_4", run<cp_async_kernel<4>>},
    {"cp_async_8", run<cp_async_kernel<8>>},
    {"cp_async_16", run<cp_async_kernel<16>>},
    {"shared_2", run<shared_kernel<Half>>},
    {"shared_4", run<shared_kernel<float>>},
    {"shared_8", run<shared_kernel<Words2>>},
    {"shared_16", run<shared_kernel<Words4>>},
    {"constant_4", run<constant_kernel<float>>},
    {"constant_8", run<constant_kernel<Words2>>},
    {"constant_16", run<constant_kernel<Words4>>},
    {"atomic", run<atomic_kernel>},
    {"message", run<message_kernel>},
};
extern const int kSm80Count = sizeof(kSm80) / sizeof(Entry);

}  // namespace fastattn::cuda::probes
