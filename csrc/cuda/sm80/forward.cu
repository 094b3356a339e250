// Forward with tensor cores for plain, causal and windowed attention: one block per tile of queries of a head.
#include "cuda/launch.h"
#include "cuda/scheduler.h"
#include "cuda/sm80/forward.h"
#include "cuda/sm80/kernels.h"

namespace fastattn::cuda::sm80 {
namespace {

FASTATTN_DEVICE int64_t query_tiles(const AttentionParams& p, int size) { return (p.seqlen_q + size - 1) / size; }

// Scores of keys outside the band become -inf; row block m starts at query i0 + first_row(m).
template <typename Loop, int kM, int kN>
FASTATTN_DEVICE void apply_band(float (&s)[kM][kN][4], const Band& band, int i0, int j0) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + Loop::first_row(m) + fragment_row(2 * half);
            const int begin = band.keys_begin(i) - j0 - fragment_col(0), end = band.keys_end(i) - j0 - fragment_col(0);
#pragma unroll
            for (int n = 0; n < kN; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int col = 8 * n + e;
                    if (col < begin || col >= end) s[m][n][2 * half + e] = -INFINITY;
                }
            }
        }
    }
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL(forward_tile(kHeadDim).threads(), 1)
forward_kernel(FASTATTN_CONSTANT AttentionParams p) {
    using Loop = ForwardLoop<T, kHeadDim, false>;
    using Layout = typename Loop::Layout;
    constexpr ForwardTile kTile = Loop::kTile;

    const int64_t tiles_q = query_tiles(p, kTile.queries);
    const WorkItem work =
        work_item(block_index(), tiles_q, p.batch * p.heads_q, p.seqlen_k * (p.head_dim_qk + p.head_dim_v) * 2);
    const int heads_q = static_cast<int>(p.heads_q), group = heads_q / static_cast<int>(p.heads_k);
    const int b = work.head / heads_q, h = work.head % heads_q, hk = h / group;
    const Band band = Band::of(p, b);
    const int i0 = static_cast<int>(tiles_q - 1 - work.tile) * kTile.queries;  // the last sees the most keys
    if (i0 >= band.seqlen_q) return;

    const TileRange tiles = band.key_tiles(i0, min32(i0 + kTile.queries, band.seqlen_q) - 1, kTile.keys);
    if (tiles.count() > 0) {  // else nobody would wait for it
        TileLoader<T, kTile.queries, kHeadDim, Loop::kThreads>{query_matrix<const T>(p.q, band, h, p.head_dim_qk)}(
            smem_base(), i0);
    }
    const TileLoader<T, kTile.keys, kHeadDim, Loop::kThreads> load_k(key_matrix<const T>(p.k, band, hk, p.head_dim_qk));
    const TileLoader<T, kTile.keys, kHeadDim, Loop::kThreads> load_v(key_matrix<const T>(p.v, band, hk, p.head_dim_v));

    Loop loop(static_cast<float>(p.softmax_scale) * kLog2E);
    const auto rules = [&](auto& s, int j0, int) { apply_band<Loop>(s, band, i0, j0); };
    const auto no_dropout = [](auto&, int) {};
    loop.run(tiles, 0, tiles.masked(), tiles.count(), false, load_k, load_v, rules, no_dropout);
    // The rows of the tile that exist: their output must be free of the NaN of keys they do not see.
    uint32_t rows = 0;
#pragma unroll
    for (int r = 0; r < 2 * Loop::kM; ++r) {
        if (i0 + Loop::first_row(r / 2) + fragment_row(2 * (r & 1)) < band.seqlen_q) rows |= 1u << r;
    }
    if (tiles.masked() > 0 && barrier_or(any_nonfinite(loop.out, rows))) {
        loop.run(tiles, 0, tiles.count(), tiles.count(), true, load_k, load_v, rules, no_dropout);
    }

    // Each warp turns its rows, through the part of the tile of Q that only it has read, into 16-byte chunks.
    loop.softmax.finish();
    const Matrix<T> out = query_matrix<T>(p.out, band, h, p.head_dim_v);
    float* lse = band.row_of(p.lse, h, i0);
#pragma unroll
    for (int m = 0; m < Loop::kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = Loop::first_row(m) + fragment_row(2 * half);
            if ((lane() & 3) == 0 && i0 + row < out.rows) {
                store_global(&lse[row * p.lse.stride[2]], loop.softmax.lse(m, half));
            }
            const float factor = loop.softmax.normalizer(m, half);
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) {
                store_shared(smem_base() + Layout::offset(row, n) + 2 * fragment_col(0),
                             pack<T>(loop.out[m][n][2 * half] * factor, loop.out[m][n][2 * half + 1] * factor));
            }
        }
    }
    warp_barrier();
#pragma unroll
    for (int m = 0; m < Loop::kM; ++m) {
#pragma unroll
        for (int n = 0; n < 16 * Layout::kChunks / 32; ++n) {
            const int row = Loop::first_row(m) + (n * 32 + lane()) / Layout::kChunks;
            const int chunk = (n * 32 + lane()) % Layout::kChunks;
            if (i0 + row < out.rows && 8 * chunk < out.cols) {
                store_global(reinterpret_cast<Words4*>(out.data + (i0 + row) * out.row_stride + 8 * chunk),
                             load_shared<Words4>(smem_base() + Layout::offset(row, chunk)));
            }
        }
    }
}

}  // namespace

template <typename T, int kHeadDim>
void forward(const AttentionParams& p, void* stream) {
    constexpr ForwardTile kTile = forward_tile(kHeadDim);
    const int64_t tiles = (p.seqlen_q + kTile.queries - 1) / kTile.queries;
    launch(forward_kernel<T, kHeadDim>, {tiles * p.heads_q * p.batch}, kTile.threads(), kTile.shared_bytes(kHeadDim),
           stream, p);
}

template void forward<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm80
