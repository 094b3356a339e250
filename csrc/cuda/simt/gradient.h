// P and dS of a tile, recomputed from lse and delta, without tensor cores.
//
//     delta = rowsum(dO * O) - dlse;  P = exp(S - lse);  dP = dropout(dO V^T);  dS = P * (dP - delta)
//
// The workspace begins with delta, (batches_q, heads_q, rows_q) float.
#pragma once

#include "cuda/ptx/opaque.h"
#include "cuda/simt/scores.h"

namespace fastattn::cuda::simt {

// P after dropout and dS of a thread's 4 x 4 entries, kInvisible where invisible.
struct Recomputed {
    Accumulator p, ds;
};

// Returns whether any entry of the tile at queries i0 and keys j0 is visible; only then is the result set. dS is that
// of the bias if kOfBias, else that of the scores before they are capped.
template <typename T, bool kOfBias = false>
FASTATTN_DEVICE bool recompute(Recomputed& result, const EntryRules& rules, int h, int i0, int j0) {
    const AttentionParams& p = rules.p;
    const Band& band = rules.band;
    const Position at = {h, i0 + 4 * ty(), j0 + 4 * tx()};
    const int hk = h / static_cast<int>(p.heads_q / p.heads_k);
    const Bits visible = visible_entries(rules, at);
    if (!barrier_or(visible.bits != 0)) return false;
    dot_rows<T>(result.p, query_matrix<const T>(p.q, band, h, p.head_dim_qk).from(i0, 0),
                key_matrix<const T>(p.k, band, hk, p.head_dim_qk).from(j0, 0));
    dot_rows<T>(result.ds, query_matrix<const T>(p.grad_out, band, h, p.head_dim_v).from(i0, 0),
                key_matrix<const T>(p.v, band, hk, p.head_dim_v).from(j0, 0));
    const Bits keep = dropout_keep(rules, at);
    const float dropout_scale = p.dropout_threshold ? static_cast<float>(p.dropout_scale) : 1.f;
    const float scale = static_cast<float>(p.softmax_scale);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int i = opaque(at.i + r);
        const bool exists = i < band.seqlen_q;
        const EntryRules::Row row = rules.row(h, i);
        const float lse = exists ? load_global(band.row_of(p.lse, h, i)) : -INFINITY;
        const float delta =
            exists ? load_global(static_cast<const float*>(p.workspace) + band.row_index(p, h, i)) : 0.f;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float& prob = result.p[r][c];
            float& ds = result.ds[r][c];
            if (visible.at(r, c) && lse != -INFINITY) {
                const float factor = keep.at(r, c) ? dropout_scale : 0.f;
                float slope;
                const float capped = rules.capped(prob * scale, slope);
                prob = exp2f((rules.biased(row, capped, at.j + c) - lse) * kLog2E);
                if (kOfBias) slope = 1.f;
                // + 0: a visible -0 becomes 0
                ds = prob * slope * ((keep.at(r, c) ? ds * factor : 0.f) - delta) + 0.f;
                prob *= factor;
            } else {
                prob = ds = kInvisible;
            }
        }
    }
    return true;
}

}  // namespace fastattn::cuda::simt
