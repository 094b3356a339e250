// Backward without tensor cores: three passes that recompute P from lse and need no atomics, so every sum has one
// order.
//
//     delta = rowsum(dO * O) - dlse;  P = exp(S - lse);  dP = dropout(dO V^T);  dS = P * (dP - delta)
//     dkdv: one block per 64 keys;     dV = dropout(P)^T dO,  dK = softmax_scale dS^T Q, over the group's query heads
//     dq:   one block per 64 queries;  dQ = softmax_scale dS K
//     dbias: one block per 64 x 64 entries of the bias; the sum of dS over what was broadcast
#include "cuda/launch.h"
#include "cuda/simt/kernels.h"
#include "cuda/simt/scores.h"

namespace fastattn::cuda::simt {
namespace {

FASTATTN_DEVICE int64_t delta_index(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
    return (b * p.heads_q + h) * p.seqlen_q + i;
}

// The element of a (batch, heads, seqlen_q) tensor.
FASTATTN_DEVICE const float* row_of(const Tensor4& x, int64_t b, int64_t h, int64_t i) {
    return static_cast<const float*>(x.data) + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
}

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

// P after dropout and dS of a thread's 4 x 4 entries, kInvisible where invisible.
struct Recomputed {
    Accumulator p, ds;
};

// Returns whether any entry of the tile at queries i0 and keys j0 is visible; only then is the result set.
template <typename T>
FASTATTN_DEVICE bool recompute(Recomputed& result, const AttentionParams& p, int64_t b, int64_t h, int64_t i0,
                               int64_t j0) {
    const Position at = {b, h, i0 + 4 * ty(), j0 + 4 * tx()};
    const int64_t hk = h / (p.heads_q / p.heads_k);
    dot_rows<T>(result.p, head_matrix<const T>(p.q, b, h, p.seqlen_q, p.head_dim_qk).from(i0, 0),
                head_matrix<const T>(p.k, b, hk, p.seqlen_k, p.head_dim_qk).from(j0, 0));
    const Bits visible = finish_scores(p, at, result.p);
    if (!barrier_or(visible.bits != 0)) return false;
    dot_rows<T>(result.ds, head_matrix<const T>(p.grad_out, b, h, p.seqlen_q, p.head_dim_v).from(i0, 0),
                head_matrix<const T>(p.v, b, hk, p.seqlen_k, p.head_dim_v).from(j0, 0));
    const Bits keep = dropout_keep(p, at);
    const float dropout_scale = p.dropout_threshold ? static_cast<float>(p.dropout_scale) : 1.f;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int64_t i = at.i + r;
        const bool exists = i < p.seqlen_q;
        const float lse = exists ? load_global(row_of(p.lse, b, h, i)) : -INFINITY;
        const float delta =
            exists ? load_global(static_cast<const float*>(p.workspace) + delta_index(p, b, h, i)) : 0.f;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float& prob = result.p[r][c];
            float& ds = result.ds[r][c];
            if (visible.at(r, c) && lse != -INFINITY) {
                const float factor = keep.at(r, c) ? dropout_scale : 0.f;
                prob = exp2f((prob - lse) * kLog2E);
                ds = prob * ((keep.at(r, c) ? ds * factor : 0.f) - delta) + 0.f;  // + 0: a visible -0 becomes 0
                prob *= factor;
            } else {
                prob = ds = kInvisible;
            }
        }
    }
    return true;
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
        const auto q = head_matrix<const T>(p.q, b, h, p.seqlen_q, p.head_dim_qk);
        const auto grad_out = head_matrix<const T>(p.grad_out, b, h, p.seqlen_q, p.head_dim_v);
        for (int64_t i0 = queries.begin; i0 < queries.end; i0 += kBlock) {
            Recomputed tile;
            if (!recompute<T>(tile, p, b, h, i0, j0)) continue;
            store_exchange<false>(tile.p);
            accumulate(dv, grad_out.from(i0, 0));
            store_exchange<false>(tile.ds);
            accumulate(dk, q.from(i0, 0));
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

// The blocks of dbias_kernel along one dimension: tiles of it, or one block that sums over all of it.
FASTATTN_DEVICE Range summed(int64_t bias_size, int64_t size, int64_t index, int64_t step) {
    return bias_size == 1 ? Range{0, size} : Range{index * step, min64((index + 1) * step, size)};
}

template <typename T>
FASTATTN_KERNEL(kThreads, 1)
dbias_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int64_t tiles_i = (p.bias_shape[2] + kBlock - 1) / kBlock, tiles_j = (p.bias_shape[3] + kBlock - 1) / kBlock;
    const int64_t tile_j = block_index() % tiles_j, tile_i = block_index() / tiles_j % tiles_i;
    const int64_t head = block_index() / tiles_j / tiles_i % p.bias_shape[1];
    const int64_t batch = block_index() / tiles_j / tiles_i / p.bias_shape[1];
    const Range batches = summed(p.bias_shape[0], p.batch, batch, 1);
    const Range heads = summed(p.bias_shape[1], p.heads_q, head, 1);
    const Range queries = summed(p.bias_shape[2], p.seqlen_q, tile_i, kBlock);
    const Range keys = summed(p.bias_shape[3], p.seqlen_k, tile_j, kBlock);

    Accumulator total[1];
    clear(total);
    for (int64_t bh = 0; bh < (batches.end - batches.begin) * (heads.end - heads.begin); ++bh) {
        const int64_t b = batches.begin + bh / (heads.end - heads.begin);
        const int64_t h = heads.begin + bh % (heads.end - heads.begin);
        for (int64_t i0 = queries.begin; i0 < queries.end; i0 += kBlock) {
            const Range seen = visible_keys(p, i0, min64(i0 + kBlock, queries.end), kBlock);
            for (int64_t j0 = max64(seen.begin, keys.begin); j0 < min64(seen.end, keys.end); j0 += kBlock) {
                Recomputed tile;
                if (!recompute<T>(tile, p, b, h, i0, j0)) continue;
#pragma unroll
                for (int e = 0; e < 16; ++e) total[0][e / 4][e % 4] += tile.ds[e / 4][e % 4];
            }
        }
    }

    // The tile's own rows and columns are summed where the bias has size 1 there, by one thread for each result.
    store_exchange<false>(total[0]);
    barrier();
    const int rows = static_cast<int>(min64(kBlock, p.bias_shape[2] - tile_i * kBlock));
    const int cols = static_cast<int>(min64(kBlock, p.bias_shape[3] - tile_j * kBlock));
    const int sum_rows = p.bias_shape[2] == 1 ? kBlock : 1, sum_cols = p.bias_shape[3] == 1 ? kBlock : 1;
    for (int e = thread_index(); e < rows * cols; e += kThreads) {
        const int row = e / cols, col = e % cols;
        float sum = 0.f;
        for (int r = row; r < row + sum_rows; ++r) {
            for (int c = col; c < col + sum_cols; ++c) sum += load_shared<float>(at(smem_base() + kExchange, r, c));
        }
        write_dbias(p,
                    batch * p.dbias.stride[0] + head * p.dbias.stride[1] + (tile_i * kBlock + row) * p.dbias.stride[2] +
                        (tile_j * kBlock + col) * p.dbias.stride[3],
                    sum);
    }
}

}  // namespace

template <typename T, int kHeadDim>
void backward(const AttentionParams& p, void* stream) {
    const auto tiles = [](int64_t size) { return (size + kBlock - 1) / kBlock; };
    const int64_t rows = p.batch * p.heads_q * p.seqlen_q;
    launch(delta_kernel<T>, {(rows + kThreads - 1) / kThreads}, kThreads, 0, stream, p);
    launch(dkdv_kernel<T, kHeadDim>, {tiles(p.seqlen_k) * p.heads_k * p.batch}, kThreads, kSharedBytes, stream, p);
    launch(dq_kernel<T, kHeadDim>, {tiles(p.seqlen_q) * p.heads_q * p.batch}, kThreads, kSharedBytes, stream, p);
    if (p.dbias.data) {
        launch(dbias_kernel<T>, {p.bias_shape[0] * p.bias_shape[1] * tiles(p.bias_shape[2]) * tiles(p.bias_shape[3])},
               kThreads, kSharedBytes, stream, p);
    }
}

template void backward<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::simt
