// Probes of the Hopper wrappers; compiled for sm_90a.
#include "cuda/ptx/bulk_copy.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/stmatrix.h"
#include "cuda/ptx/wgmma.h"
#include "probes/probes.h"

namespace fastattn::cuda::probes {
namespace {

constexpr uint32_t kBar = 40 << 10;  // the mbarrier's place in shared memory

// in: register m of lane l at 32 m + l. out: the matrices.
template <int kCount, bool kTransposed>
FASTATTN_KERNEL(kThreads, 1)
stmatrix_kernel(FASTATTN_CONSTANT Buffers p) {
    const uint32_t shared = smem_base();
    if (thread_index() < 32) {
        const int lane = lane_index();
        uint32_t r[kCount];
#pragma unroll
        for (int m = 0; m < kCount; ++m) r[m] = load_global(p.in + 32 * m + lane);
        const uint32_t row = shared + 16 * static_cast<uint32_t>(lane % (8 * kCount));
        if constexpr (kCount == 2 && !kTransposed) stmatrix_x2(row, r);
        if constexpr (kCount == 4 && !kTransposed) stmatrix_x4(row, r);
        if constexpr (kCount == 2 && kTransposed) stmatrix_x2_trans(row, r);
        if constexpr (kCount == 4 && kTransposed) stmatrix_x4_trans(row, r);
    }
    dump_shared(p, shared);
}

FASTATTN_DEVICE void init_mbarrier() {
    if (thread_index() == 0) {
        mbarrier_init(smem_base() + kBar, 1);
        fence_mbarrier_init();
    }
    barrier();
}

// A tensor of kRank dimensions of 16-bit elements (64, 3, 5, 2[, 2]) and a box of 64 x 2 x 4 x 1 x 1 from (0, 1, 3, 1,
// 1) on, which reaches out of it; kShift moves the box along the contiguous dimension. out: shared memory as it then
// is.
constexpr int kBoxWords = 64 / 2 * 2 * 4;
template <int kRank, int kShift>
FASTATTN_KERNEL(kThreads, 1)
tma_load_kernel(FASTATTN_CONSTANT TensorMap map, FASTATTN_CONSTANT Buffers p) {
    init_mbarrier();
    const uint32_t shared = smem_base(), bar = shared + kBar;
    if (thread_index() == 0) {
        mbarrier_arrive_expect_tx(bar, kBoxWords * 4);
        if constexpr (kRank == 4) tma_load(shared, map, bar, kShift, 1, 3, 1);
        if constexpr (kRank == 5) tma_load(shared, map, bar, kShift, 1, 3, 1, 1);
    }
    mbarrier_wait(bar, 0);
    dump_shared(p, shared);
}

template <int kRank, DType kDType>
TensorMap map_of(const void* base, Swizzle swizzle) {
    constexpr int kBytes = kDType == DType::kFloat32 ? 4 : 2, kInner = 128 / kBytes;
    constexpr int64_t kRow = 128;
    if constexpr (kRank == 4) {
        return make_tensor_map<4>(kDType, base, {kInner, 3, 5, 2}, {kRow, 3 * kRow, 15 * kRow}, {kInner, 2, 4, 1},
                                  swizzle);
    } else {
        return make_tensor_map<5>(kDType, base, {kInner, 3, 5, 2, 2}, {kRow, 3 * kRow, 15 * kRow, 30 * kRow},
                                  {kInner, 2, 4, 1, 1}, swizzle);
    }
}

template <int kRank, int kShift, Swizzle kSwizzle>
void run_tma_load(const Buffers& buffers, void* stream) {
    launch(tma_load_kernel<kRank, kShift>, {1}, kThreads, 48 << 10, stream,
           map_of<kRank, DType::kBFloat16>(buffers.in, kSwizzle), buffers);
}

// The way back: in is what lies in shared memory, out the tensor, zeros before. add: floats, added to 1.
enum class Store { kCopy, kAdd };
template <int kRank, Store kStore>
FASTATTN_KERNEL(kThreads, 1)
tma_store_kernel(FASTATTN_CONSTANT TensorMap map, FASTATTN_CONSTANT Buffers p) {
    const uint32_t shared = smem_base();
    for (int n = thread_index(); n < p.out_words; n += kThreads) {
        store_global(p.out + n, kStore == Store::kAdd ? 0x3f800000u : 0u);
    }
    fill_shared(p, shared);
    fence_proxy_async();
    barrier();
    if (thread_index() == 0) {
        if constexpr (kRank == 4 && kStore == Store::kCopy) tma_store(map, shared, 0, 1, 3, 1);
        if constexpr (kRank == 5) tma_store(map, shared, 0, 1, 3, 1, 1);
        if constexpr (kStore == Store::kAdd) tma_reduce_add(map, shared, 0, 1, 3, 1);
        bulk_commit();
        bulk_wait<0>();
    }
}

template <int kRank, Store kStore>
void run_tma_store(const Buffers& buffers, void* stream) {
    launch(tma_store_kernel<kRank, kStore>, {1}, kThreads, 48 << 10, stream,
           map_of<kRank, kStore == Store::kAdd ? DType::kFloat32 : DType::kBFloat16>(buffers.out, Swizzle::k128Bytes),
           buffers);
}

// Rows of 64 bytes: the box is 32 wide, Swizzle::k64Bytes.
void run_tma_load_64(const Buffers& buffers, void* stream) {
    constexpr int64_t kRow = 128;
    const TensorMap map = make_tensor_map<4>(DType::kBFloat16, buffers.in, {64, 3, 5, 2}, {kRow, 3 * kRow, 15 * kRow},
                                             {32, 2, 8, 1}, Swizzle::k64Bytes);
    launch(tma_load_kernel<4, 32>, {1}, kThreads, 48 << 10, stream, map, buffers);
}

// D = A B^T of 64 x 32 matrices whose rows are 64 bytes, swizzled; in and out as for wgmma_kernel below.
FASTATTN_KERNEL(kThreads, 1)
wgmma_64_kernel(FASTATTN_CONSTANT Buffers p) {
    const uint32_t a = smem_base(), b = a + 64 * 64;
    fill_shared(p, a);
    float d[32];
#pragma unroll
    for (float& x : d) x = 0.f;
    fence_proxy_async();
    barrier();
    wgmma_fence(d);
#pragma unroll
    for (uint32_t k = 0; k < 2; ++k) {
        wgmma_ss<Half, 64, false, false>(d, descriptor_64(a + 32 * k, 16, 512), descriptor_64(b + 32 * k, 16, 512),
                                         k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
#pragma unroll
    for (int n = 0; n < 32; ++n) store_global(p.out + n * kThreads + thread_index(), float_bits(d[n]));
}

// out = 1 + in (add) or in, by bulk copies both ways.
template <Store kStore>
FASTATTN_KERNEL(kThreads, 1)
bulk_kernel(FASTATTN_CONSTANT Buffers p) {
    init_mbarrier();
    const uint32_t shared = smem_base(), bar = shared + kBar;
    const int bytes = static_cast<int>(p.in_words) * 4;
    for (int n = thread_index(); n < p.out_words; n += kThreads) store_global(p.out + n, 0x3f800000u);
    barrier();
    if (thread_index() != 0) return;
    mbarrier_arrive_expect_tx(bar, bytes);
    bulk_load(shared, p.in, bytes, bar);
    mbarrier_wait(bar, 0);
    if (kStore == Store::kAdd) {
        bulk_reduce_add(reinterpret_cast<float*>(p.out), shared, bytes);
    } else {
        bulk_store(p.out, shared, bytes);
    }
    bulk_commit();
    bulk_wait<0>();
}

// in: A, then B, as they lie in shared memory, 128-byte swizzle, both 64 elements of 16 bits (128 of 8) a row:
//   A (64 x 64) by rows along K, or transposed by rows along M; B (N x 64) by rows along K, or transposed (64 x N) by
//   rows along N, 64 columns after 64 columns.
// out: the accumulators of D = A B, register by register.
template <typename T, int N, bool kARegisters, bool kTransposeA, bool kTransposeB>
FASTATTN_KERNEL(kThreads, 1)
wgmma_kernel(FASTATTN_CONSTANT Buffers p) {
    constexpr uint32_t kA = 64 * 128;
    const uint32_t a = smem_base(), b = a + kA;
    fill_shared(p, a);
    float d[N / 2];
#pragma unroll
    for (int n = 0; n < N / 2; ++n) d[n] = 1.f;
    uint32_t fragment[4][4];
    const int lane = lane_index(), row = thread_index() / 32 * 16 + lane / 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int bytes = (row + r % 2 * 8) * 128 + k * 32 + r / 2 * 16 + lane % 4 * 4;
            fragment[k][r] = load_shared<uint32_t>(swizzle_128(a + static_cast<uint32_t>(bytes)));
        }
    }
    fence_proxy_async();
    barrier();
    wgmma_fence(d);
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
        const uint64_t a_descriptor =
            kTransposeA ? descriptor_128(a + 2048 * k, 8192, 1024) : descriptor_128(a + 32 * k, 16, 1024);
        const uint64_t b_descriptor =
            kTransposeB ? descriptor_128(b + 2048 * k, 8192, 1024) : descriptor_128(b + 32 * k, 16, 1024);
        if constexpr (kARegisters) {
            wgmma_rs<T, N, kTransposeB>(d, fragment[k], b_descriptor, true);
        } else {
            wgmma_ss<T, N, kTransposeA, kTransposeB>(d, a_descriptor, b_descriptor, k > 0);
        }
    }
    wgmma_commit();
    wgmma_wait<0>(d);
#pragma unroll
    for (int n = 0; n < N / 2; ++n) store_global(p.out + n * kThreads + thread_index(), float_bits(d[n]));
}

// in: floats, or e4m3 numbers. out: four e4m3 numbers a word, or floats.
FASTATTN_KERNEL(kThreads, 1) e4m3_pack_kernel(FASTATTN_CONSTANT Buffers p) {
    for (int n = thread_index(); n < p.out_words; n += kThreads) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = bits_float(load_global(p.in + 4 * n + e));
        store_global(p.out + n, pack_e4m3(x[0], x[1], x[2], x[3]));
    }
}
FASTATTN_KERNEL(kThreads, 1) e4m3_unpack_kernel(FASTATTN_CONSTANT Buffers p) {
    for (int n = thread_index(); n < p.out_words; n += kThreads) {
        const E4M3 x = {static_cast<uint8_t>(load_global(p.in + n / 4) >> n % 4 * 8)};
        store_global(p.out + n, float_bits(to_float(x)));
    }
}

}  // namespace

extern const Entry kSm90[] = {
    {"stmatrix_x2", run<stmatrix_kernel<2, false>>},
    {"stmatrix_x4", run<stmatrix_kernel<4, false>>},
    {"stmatrix_x2_trans", run<stmatrix_kernel<2, true>>},
    {"stmatrix_x4_trans", run<stmatrix_kernel<4, true>>},
    {"tma_load_4d", run_tma_load<4, 0, Swizzle::k128Bytes>},
    {"tma_load_5d", run_tma_load<5, 0, Swizzle::k128Bytes>},
    {"tma_load_4d_plain", run_tma_load<4, 0, Swizzle::kNone>},
    {"tma_load_4d_left", run_tma_load<4, -8, Swizzle::k128Bytes>},
    {"tma_load_4d_right", run_tma_load<4, 8, Swizzle::k128Bytes>},
    {"tma_load_rows_of_64", run_tma_load_64},
    {"wgmma_rows_of_64", run<wgmma_64_kernel>},
    {"tma_store_4d", run_tma_store<4, Store::kCopy>},
    {"tma_store_5d", run_tma_store<5, Store::kCopy>},
    {"tma_reduce_add", run_tma_store<4, Store::kAdd>},
    {"bulk_copy", run<bulk_kernel<Store::kCopy>>},
    {"bulk_reduce_add", run<bulk_kernel<Store::kAdd>>},
    {"wgmma_ss_half_64", run<wgmma_kernel<Half, 64, false, false, false>>},
    {"wgmma_ss_bfloat16_176", run<wgmma_kernel<BFloat16, 176, false, false, false>>},
    {"wgmma_ss_ta_bfloat16_80", run<wgmma_kernel<BFloat16, 80, false, true, false>>},
    {"wgmma_ss_tb_half_128", run<wgmma_kernel<Half, 128, false, false, true>>},
    {"wgmma_rs_half_96", run<wgmma_kernel<Half, 96, true, false, false>>},
    {"wgmma_ss_e4m3_128", run<wgmma_kernel<E4M3, 128, false, false, false>>},
    {"wgmma_rs_e4m3_64", run<wgmma_kernel<E4M3, 64, true, false, false>>},
    {"e4m3_pack", run<e4m3_pack_kernel>},
    {"e4m3_unpack", run<e4m3_unpack_kernel>},
    {"wgmma_rs_tb_bfloat16_192", run<wgmma_kernel<BFloat16, 192, true, false, true>>},
};
extern const int kSm90Count = sizeof(kSm90) / sizeof(Entry);

}  // namespace fastattn::cuda::probes
