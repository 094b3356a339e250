// Forward without tensor cores: one block per 64 queries of a head, online softmax over tiles of 64 keys.
//
//     S = softmax_scale Q K^T + bias;  m' = max(m, rowmax S);  P = exp(S - m')
//     l = l exp(m - m') + rowsum P;    O = O exp(m - m') + dropout(P) V
//     out = O / l,  lse = m + log l;   a row that sees nothing: 0, -inf
//
// HAZARD: with a bias of finfo.min, S log2(e) overflows; the maximum is subtracted first.
#include "cuda/launch.h"
#include "cuda/ptx/shuffle.h"
#include "cuda/simt/kernels.h"
#include "cuda/simt/scores.h"

namespace fastattn::cuda::simt {
namespace {

// Over the 16 threads that share a row: lanes of one half of a warp.
FASTATTN_DEVICE float row_max(float x) {
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
FASTATTN_DEVICE float row_sum(float x) {
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

// The online softmax of a thread's four rows.
struct Softmax {
    float max[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    float sum[4] = {0.f, 0.f, 0.f, 0.f};  // this thread's columns only, until finish()

    // Turns scores into P, invisible entries into kInvisible; rescale: what earlier results are to be multiplied with.
    FASTATTN_DEVICE void update(Accumulator& s, Bits visible, float (&rescale)[4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float new_max = fmaxf(max[r], row_max(fmaxf(fmaxf(s[r][0], s[r][1]), fmaxf(s[r][2], s[r][3]))));
            const float base = new_max == -INFINITY ? 0.f : new_max;  // -inf - -inf would be NaN
            rescale[r] = exp2f((max[r] - base) * kLog2E);
            max[r] = new_max;
            sum[r] *= rescale[r];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                s[r][c] = visible.at(r, c) ? exp2f((s[r][c] - base) * kLog2E) : kInvisible;
                sum[r] += s[r][c];
            }
        }
    }

    FASTATTN_DEVICE void finish() {
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r] = row_sum(sum[r]);
    }
};

template <typename T, int kHeadDim>
FASTATTN_KERNEL(kThreads, 1)
forward_kernel(FASTATTN_CONSTANT AttentionParams p) {
    // The last tile first: under a causal window it sees the most keys.
    const int tiles = static_cast<int>((p.seqlen_q + kBlock - 1) / kBlock), heads_q = static_cast<int>(p.heads_q);
    const int block = static_cast<int>(block_index()), i0 = (tiles - 1 - block % tiles) * kBlock;
    const int h = block / tiles % heads_q, b = block / tiles / heads_q,
              hk = h / static_cast<int>(p.heads_q / p.heads_k);
    const Band band = Band::of(p, b);
    if (i0 >= band.seqlen_q) return;
    const EntryRules rules(p, band, b);
    const float scale = static_cast<float>(p.softmax_scale);

    const auto q = query_matrix<const T>(p.q, band, h, p.head_dim_qk).from(i0, 0);
    const auto k = key_matrix<const T>(p.k, band, hk, p.head_dim_qk);
    const auto v = key_matrix<const T>(p.v, band, hk, p.head_dim_v);

    Softmax softmax;
    Accumulator o[kHeadDim / kBlock];
    clear(o);
    const TileRange keys = key_tiles(p, band, i0);
    for (int j0 = keys.first * kBlock; j0 < keys.last * kBlock; j0 += kBlock) {
        const Position at = {h, i0 + 4 * ty(), j0 + 4 * tx()};
        const Bits visible = visible_entries(rules, at);
        if (!barrier_or(visible.bits != 0)) continue;
        Accumulator s;
        dot_rows<T>(s, q, k.from(j0, 0));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const EntryRules::Row row = rules.row(h, opaque(at.i + r));
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                float slope, score = rules.capped(s[r][c] * scale, slope);
                s[r][c] = visible.at(r, c) ? rules.biased(row, score, at.j + c) : -INFINITY;
            }
        }

        float rescale[4];
        softmax.update(s, visible, rescale);
        if (p.dropout_threshold) {
            const Bits keep = dropout_keep(rules, at);
#pragma unroll
            for (int e = 0; e < 16; ++e) {
                if (visible.at(e / 4, e % 4) && !keep.at(e / 4, e % 4)) s[e / 4][e % 4] = 0.f;
            }
        }
#pragma unroll
        for (int chunk = 0; chunk < kHeadDim / kBlock; ++chunk) {
#pragma unroll
            for (int e = 0; e < 16; ++e) o[chunk][e / 4][e % 4] *= rescale[e / 4];
        }
        store_exchange<true>(s);
        accumulate(o, v.from(j0, 0));
    }

    softmax.finish();
    const float dropout_scale = p.dropout_threshold ? static_cast<float>(p.dropout_scale) : 1.f;
    float factor[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int i = i0 + 4 * ty() + r;
        const bool sees_nothing = softmax.sum[r] == 0.f;
        float lse = sees_nothing ? -INFINITY : softmax.max[r] + logf(softmax.sum[r]);
        factor[r] = sees_nothing ? 0.f : dropout_scale / softmax.sum[r];
        if (p.sinks.data) factor[r] *= add_sink(lse, sink_of(p, h));
        if (tx() == 0 && i < band.seqlen_q) store_global(band.row_of(p.lse, h, i), lse);
    }
    write(query_matrix<T>(p.out, band, h, p.head_dim_v).from(i0, 0), o, factor);
}

}  // namespace

template <typename T, int kHeadDim>
void forward(const AttentionParams& p, void* stream) {
    const int64_t tiles = (p.seqlen_q + kBlock - 1) / kBlock;
    launch(forward_kernel<T, kHeadDim>, {tiles * p.heads_q * p.batch}, kThreads, kSharedBytes, stream, p);
}

template void forward<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::simt
