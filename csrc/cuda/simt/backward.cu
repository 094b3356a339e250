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
    if (row >= all_rows(p)) return;
    const TableRow at = TableRow::of(p, row);
    const T* out = static_cast<const T*>(p.out.data) + at.offset(p.out);
    const T* grad_out = static_cast<const T*>(p.grad_out.data) + at.offset(p.grad_out);
    float delta = 0.f;
    for (int64_t d = 0; d < p.head_dim_v; ++d) {
        delta += to_float(load_global(&out[d * p.out.stride[3]])) *
                 to_float(load_global(&grad_out[d * p.grad_out.stride[3]]));
    }
    if (p.grad_lse.data) delta -= load_global(static_cast<const float*>(p.grad_lse.data) + at.offset(p.grad_lse));
    store_global(static_cast<float*>(p.workspace) + row, delta);
}

// What a block of dkdv_kernel is about. The first tile first: under a causal window it is seen by the most queries.
struct KeyTile {
    int b, hk, j0;

    static FASTATTN_DEVICE KeyTile of(const AttentionParams& p, int block) {
        const int tiles = static_cast<int>((p.seqlen_k + kBlock - 1) / kBlock), heads_k = static_cast<int>(p.heads_k);
        return {block / tiles / heads_k, block / tiles % heads_k, block % tiles * kBlock};
    }
};

template <typename T, int kHeadDim>
FASTATTN_KERNEL(kThreads, 1)
dkdv_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const KeyTile at = KeyTile::of(p, static_cast<int>(block_index()));
    const int j0 = at.j0, b = at.b, group = static_cast<int>(p.heads_q / p.heads_k);
    if (j0 >= room_of(p, b)) return;

    Accumulator dk[kHeadDim / kBlock], dv[kHeadDim / kBlock];
    clear(dk);
    clear(dv);
    const TileRange queries = query_tiles(p, Band::of(p, b), j0);
    // All about the sequence is looked up again for each tile: kept, it costs registers that spill at 256.
    for (int turn = group * queries.count() - 1; turn >= 0; --turn) {
        const int entry = opaque(b), head = at.hk * group + turn / queries.count();
        const int i0 = (queries.first + turn % queries.count()) * kBlock;
        const Band band = Band::of(p, entry);
        Recomputed tile;
        if (!recompute<T>(tile, EntryRules(p, band, entry), head, i0, j0)) continue;
        store_exchange<false>(tile.p);
        accumulate(dv, query_matrix<const T>(p.grad_out, band, head, p.head_dim_v).from(i0, 0));
        store_exchange<false>(tile.ds);
        accumulate(dk, query_matrix<const T>(p.q, band, head, p.head_dim_qk).from(i0, 0));
    }
    const KeyTile to = KeyTile::of(p, opaque(static_cast<int>(block_index())));
    const Band band = Band::of(p, to.b);
    const auto whole = [&](const Tensor4& x, int64_t cols) {
        Matrix<T> matrix = key_matrix<T>(x, band, to.hk, cols);
        matrix.rows = room_of(p, to.b);
        return matrix.from(to.j0, 0);
    };
    const float scale = static_cast<float>(p.softmax_scale);
    write(whole(p.dk, p.head_dim_qk), dk, {scale, scale, scale, scale});
    write(whole(p.dv, p.head_dim_v), dv, {1.f, 1.f, 1.f, 1.f});
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL(kThreads, 1)
dq_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int tiles = static_cast<int>((p.seqlen_q + kBlock - 1) / kBlock), heads_q = static_cast<int>(p.heads_q);
    const int block = static_cast<int>(block_index()), i0 = (tiles - 1 - block % tiles) * kBlock;
    const int h = block / tiles % heads_q, b = block / tiles / heads_q;
    const Band band = Band::of(p, b);
    if (i0 >= band.seqlen_q) return;
    const EntryRules rules(p, band, b);
    const auto k = key_matrix<const T>(p.k, band, h / static_cast<int>(p.heads_q / p.heads_k), p.head_dim_qk);

    Accumulator dq[kHeadDim / kBlock];
    clear(dq);
    const TileRange keys = key_tiles(p, band, i0);
    for (int j0 = keys.first * kBlock; j0 < keys.last * kBlock; j0 += kBlock) {
        Recomputed tile;
        if (!recompute<T>(tile, rules, h, i0, j0)) continue;
        store_exchange<true>(tile.ds);
        accumulate(dq, k.from(j0, 0));
    }
    const float scale = static_cast<float>(p.softmax_scale);
    write(query_matrix<T>(p.dq, band, h, p.head_dim_qk).from(i0, 0), dq, {scale, scale, scale, scale});
}

}  // namespace

template <typename T, int kHeadDim>
void backward(const AttentionParams& p, void* stream) {
    const auto tiles = [](int64_t size) { return (size + kBlock - 1) / kBlock; };
    const int64_t rows = all_rows(p);
    launch(delta_kernel<T>, {(rows + kThreads - 1) / kThreads}, kThreads, 0, stream, p);
    launch(dkdv_kernel<T, kHeadDim>, {tiles(p.seqlen_k) * p.heads_k * p.batch}, kThreads, kSharedBytes, stream, p);
    launch(dq_kernel<T, kHeadDim>, {tiles(p.seqlen_q) * p.heads_q * p.batch}, kThreads, kSharedBytes, stream, p);
}

template void backward<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::simt
