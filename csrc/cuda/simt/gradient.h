// P and dS of a tile, recomputed from lse and delta, without tensor cores.
//
//     delta = rowsum(dO * O) - dlse;  P = exp(S - lse);  dP = dropout(dO V^T);  dS = P * (dP - delta)
//
// The workspace begins with delta, (batch, heads_q, seqlen_q) float.
#pragma once

#include "cuda/simt/scores.h"

namespace fastattn::cuda::simt {

FASTATTN_DEVICE int64_t delta_index(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
    return (b * p.heads_q + h) * p.seqlen_q + i;
}

// The element of a (batch, heads, seqlen_q) tensor.
FASTATTN_DEVICE const float* row_of(const Tensor4& x, int64_t b, int64_t h, int64_t i) {
    return static_cast<const float*>(x.data) + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
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

}  // namespace fastattn::cuda::simt
