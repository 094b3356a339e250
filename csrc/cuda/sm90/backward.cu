// The Hopper backward for one element type and head dimension: dK, dV and the sums of dQ; then dQ.
#include "cuda/sm90/backward.h"

#include "cuda/launch.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/maps.h"

namespace fastattn::cuda::sm90 {
namespace {

constexpr int kRowThreads = 256;  // of the kernels that go over rows

template <typename T, int kHeadDim, bool kRagged>
FASTATTN_KERNEL((Backward<T, kHeadDim, kRagged>::kThreads), 1)
dkdv_kernel(FASTATTN_CONSTANT BackwardArguments arguments) {
    const Backward<T, kHeadDim, kRagged> block(arguments);
    if (!block.exists()) return;
    if (thread_index() == 0) block.initialize();
    barrier();
    if (thread_index() < 128) {
        setmaxnreg_decrease<40>();
        if (thread_index() < 32) block.produce();
    } else {
        setmaxnreg_increase<232>();
        block.consume();
    }
}

struct SumsArguments {
    float* sums;
    int64_t size;  // of all sums; a multiple of 4
};

FASTATTN_KERNEL(kRowThreads, 1) clear_sums_kernel(FASTATTN_CONSTANT SumsArguments a) {
    const int64_t n = block_index() * kRowThreads + thread_index();
    if (n < a.size / 4) store_global(reinterpret_cast<Float4*>(a.sums) + n, Float4{});
}

// One warp per query: dQ = softmax_scale times its sums.
template <typename T, int kHeadDim, bool kRagged>
FASTATTN_KERNEL(kRowThreads, 1)
convert_dq_kernel(FASTATTN_CONSTANT AttentionParams p, FASTATTN_CONSTANT SumsArguments a) {
    using Sums = GradientSums<kHeadDim, kRagged>;
    const int64_t row = block_index() * (kRowThreads / 32) + thread_index() / 32;
    if (row >= all_rows(p)) return;
    const TableRow at = TableRow::of(p, row);
    int b = static_cast<int>(at.batch);
    if (kRagged && p.total_q >= 0) {
        b = last_not_after(static_cast<int>(p.batch), static_cast<int>(at.i),
                           [&](int n) { return look_up(p.cu_seqlens_q, n); });
    }
    const Band band = Band::of<kRagged>(p, b);
    const int h = static_cast<int>(at.h), i = static_cast<int>(at.i) - band.first_q;
    const int first = SequenceTiles<64, kRagged>::of_queries(p).first(b);
    RowSum<kHeadDim> dq;
    float check = 0.f;  // 0 * x is 0 for every finite x, NaN for all others
#pragma unroll
    for (int n = 0; n < dq.kPairs; ++n) {
        const float* sums = Sums::pair(a.sums, p, h, first, i, dq.column(n));
        dq.sum[n][0] = load_global(sums), dq.sum[n][1] = load_global(sums + 1);
        check = fmaf(0.f, dq.sum[n][0], fmaf(0.f, dq.sum[n][1], check));
    }
    if (any_lane(check != 0.f)) {  // perhaps only for the NaN of keys that the query does not see
        dq = {};
        redo_query_gradient<T>(p, band, h, h / static_cast<int>(p.heads_q / p.heads_k), i, dq);
    }
    T* to = static_cast<T*>(p.dq.data) + at.offset(p.dq);
    const float scale = static_cast<float>(p.softmax_scale);
#pragma unroll
    for (int n = 0; n < dq.kPairs; ++n) {
        const int col = dq.column(n);
        if (col >= p.head_dim_qk) continue;
        const uint32_t both = pack<T>(scale * dq.sum[n][0], scale * dq.sum[n][1]);
        if (col + 1 < p.head_dim_qk) {
            store_global(reinterpret_cast<uint32_t*>(to + col), both);
        } else {
            store_global(to + col, T{static_cast<uint16_t>(both)});
        }
    }
}

int64_t blocks_of(int64_t items, int64_t size) { return (items + size - 1) / size; }

}  // namespace

template <typename T, int kHeadDim>
void clear_dq_sums(const AttentionParams& p, void* stream) {
    const SumsArguments arguments{gradient_sums(p), sums_size(p, kHeadDim)};
    launch(clear_sums_kernel, {blocks_of(arguments.size, 4 * kRowThreads)}, kRowThreads, 0, stream, arguments);
}

template <typename T, int kHeadDim>
void dkdv(const AttentionParams& p, void* stream) {
    using Block = Backward<T, kHeadDim, false>;  // sizes and tiles are the same with kRagged
    const BackwardArguments arguments{
        query_map<typename Block::Queries>(p, p.q, p.head_dim_qk, Block::kTile.queries),
        key_map<typename Block::Keys>(p, p.k, p.head_dim_qk, Block::kTile.keys),
        key_map<typename Block::Values>(p, p.v, p.head_dim_v, Block::kTile.keys),
        query_map<typename Block::Grads>(p, p.grad_out, p.head_dim_v, Block::kTile.queries),
        key_map<typename Block::OwnKeys>(p, p.dk, p.head_dim_qk, 64),
        key_map<typename Block::OwnValues>(p, p.dv, p.head_dim_v, 64),
        gradient_sums(p),
        p,
    };
    launch(is_ragged(p) ? dkdv_kernel<T, kHeadDim, true> : dkdv_kernel<T, kHeadDim, false>,
           {SequenceTiles<Block::kTile.keys>::of_keys(p).count() * p.heads_k}, Block::kThreads, Block::kSharedBytes,
           stream, arguments);
}

template <typename T, int kHeadDim>
void convert_dq(const AttentionParams& p, void* stream) {
    launch(is_ragged(p) ? convert_dq_kernel<T, kHeadDim, true> : convert_dq_kernel<T, kHeadDim, false>,
           {blocks_of(all_rows(p), kRowThreads / 32)}, kRowThreads, 0, stream, p,
           SumsArguments{gradient_sums(p), sums_size(p, kHeadDim)});
}

template void clear_dq_sums<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);
template void dkdv<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);
template void convert_dq<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm90
