// Backward without tensor cores: three passes that recompute P from lse and need no atomics, so every sum has one
// order.
//
//     delta = rowsum(dO * O) - dlse;  P = exp(S - lse);  dP = dropout(dO V^T);  dS = P * (dP - delta)
//     dkdv: one block per 64 keys;     dV = dropout(P)^T dO,  dK = softmax_scale dS^T Q, over the group's query heads
//     dq:   one block per 64 queries;  dQ = softmax_scale dS K
#include "cuda/launch.h"
#include "cuda/ptx/opaque.h"
#include "cuda/simt/gradient.h"
#include "cuda/simt/kernels.h"

namespace fastattn::cuda::simt {
namespace {

// One thread per row.
template <typename T>
FASTATTN_KERNEL(kThreads, 1)
delta_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int64_t row = block_index() * kThreads + thread_index();
    if (row >= p.batch * p.heads_q * p.seqlen_q) return;
    const int64_t i = row % p.seqlen_q, h = row / p.seqlen_q % p.heads_q, b = row / p.seqlen_q / p.heads_q;
    const auto out = head_matrix<const T>(p.out, b, h, p.seqlen_q, p.head_dim_v).from(i, 0);
    const auto grad_out = head_matrix<const T>(p.grad_out, b, h, p.seqlen_q, p.head_dim_v).from(i, 0);
    float delta = 0.f;
    for (int64_t d = 0; d < p.head_dim_v; ++d) {
        delta += to_float(load_global(&out.data[d * out.col_stride])) *
                 to_float(load_global(&grad_out.data[d * grad_out.col_stride]));
    }
    if (p.grad_lse.data) {
        delta -= load_global(row_of(p.grad_lse, b, h, i));
    }
    store_global(static_cast<float*>(p.workspace) + delta_index(p, b, h, i), delta);
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL(kThreads, 1)
dkdv_kernel(FASTATTN_CONSTANT AttentionParams p) {
    // The first tile first: under a causal window it is seen by the most queries.
    const int64_t tiles = (p.seqlen_k + kBlock - 1) / kBlock;
    const int64_t j0 = block_index() % tiles * kBlock;
    const int64_t hk = block_index() / tiles % p.heads_k, b = block_index() / tiles / p.heads_k;
    const int64_t group = p.heads_q / p.heads_k;

    Accumulator dk[kHeadDim / kBlock], dv[kHeadDim / kBlock];
    clear(dk);
    clear(dv);
    const Range queries = visible_queries(p, j0, min64(j0 + kBlock, p.seqlen_k), kBlock);
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        for (int64_t i0 = queries.begin; i0 < queries.end; i0 += kBlock) {
            // Pointers to the head are computed again for each tile: kept, they cost registers that spill at 256.
            const int64_t entry = opaque(static_cast<uint32_t>(b));
            Recomputed tile;
            if (!recompute<T>(tile, p, entry, h, i0, j0)) continue;
            store_exchange<false>(tile.p);
            accumulate(dv, head_matrix<const T>(p.grad_out, entry, h, p.seqlen_q, p.head_dim_v).from(i0, 0));
            store_exchange<false>(tile.ds);
            accumulate(dk, head_matrix<const T>(p.q, entry, h, p.seqlen_q, p.head_dim_qk).from(i0, 0));
        }
    }
    const float scale = static_cast<float>(p.softmax_scale);
    write(head_matrix<T>(p.dk, b, hk, p.seqlen_k, p.head_dim_qk).from(j0, 0), dk, {scale, scale, scale, scale});
    write(head_matrix<T>(p.dv, b, hk, p.seqlen_k, p.head_dim_v).from(j0, 0), dv, {1.f, 1.f, 1.f, 1.f});
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL(kThreads, 1)
dq_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int64_t tiles = (p.seqlen_q + kBlock - 1) / kBlock;
    const int64_t i0 = (tiles - 1 - block_index() % tiles) * kBlock;
    const int64_t h = block_index() / tiles % p.heads_q, b = block_index() / tiles / p.heads_q;
    const auto k = head_matrix<const T>(p.k, b, h / (p.heads_q / p.heads_k), p.seqlen_k, p.head_dim_qk);

    Accumulator dq[kHeadDim / kBlock];
    clear(dq);
    const Range keys = visible_keys(p, i0, min64(i0 + kBlock, p.seqlen_q), kBlock);
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += kBlock) {
        Recomputed tile;
        if (!recompute<T>(tile, p, b, h, i0, j0)) continue;
        store_exchange<true>(tile.ds);
        accumulate(dq, k.from(j0, 0));
    }
    const float scale = static_cast<float>(p.softmax_scale);
    write(head_matrix<T>(p.dq, b, h, p.seqlen_q, p.head_dim_qk).from(i0, 0), dq, {scale, scale, scale, scale});
}

}  // namespace

template <typename T, int kHeadDim>
void backward(const AttentionParams& p, void* stream) {
    const auto tiles = [](int64_t size) { return (size + kBlock - 1) / kBlock; };
    const int64_t rows = p.batch * p.heads_q * p.seqlen_q;
    launch(delta_kernel<T>, {(rows + kThreads - 1) / kThreads}, kThreads, 0, stream, p);
    launch(dkdv_kernel<T, kHeadDim>, {tiles(p.seqlen_k) * p.heads_k * p.batch}, kThreads, kSharedBytes, stream, p);
    launch(dq_kernel<T, kHeadDim>, {tiles(p.seqlen_q) * p.heads_q * p.batch}, kThreads, kSharedBytes, stream, p);
}

template void backward<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::simt
