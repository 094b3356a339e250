// dQ in one order of summation: one block owns a tile of queries and runs over the keys that it sees.
#include "cuda/launch.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/opaque.h"
#include "cuda/scheduler.h"
#include "cuda/sm80/backward.h"
#include "cuda/sm80/kernels.h"

namespace fastattn::cuda::sm80 {
namespace {

template <typename T, int kHeadDim, bool kGeneral>
struct QueryTileLoop {
    static constexpr ForwardTile kTile = query_tile(kHeadDim);
    static constexpr int kThreads = kTile.threads(), kN = kTile.keys / 8;
    using Layout = SwizzledTile<kHeadDim>;
    static constexpr uint32_t kStage = kTile.keys * Layout::kRowBytes;
    static_assert(kTile.blocks() == 1);

    const AttentionParams& p;
    const Band& band;
    const int h, hk;
    const int i0;
    const TileRange tiles;
    const EntryGradient<kGeneral> gradient;
    static constexpr uint32_t kGradOut = kTile.queries * Layout::kRowBytes, kK = 2 * kGradOut, kV = kK + 2 * kStage;
    float dq[1][kHeadDim / 8][4];

    FASTATTN_DEVICE QueryTileLoop(const AttentionParams& p, const Band& band, int b, int h, int i0)
        : p(p),
          band(band),
          h(h),
          hk(h / (static_cast<int>(p.heads_q) / static_cast<int>(p.heads_k))),
          i0(i0),
          tiles(kGeneral && p.prefix_lens.data
                    ? Band::all_tiles(band.seqlen_k, kTile.keys)
                    : band.key_tiles(i0, min32(i0 + kTile.queries, band.seqlen_q) - 1, kTile.keys)),
          gradient(p, band, b) {}

    FASTATTN_DEVICE int row(int half) const { return i0 + warp() * 16 + fragment_row(2 * half); }

    template <int kRows>
    static FASTATTN_DEVICE void load(uint32_t to, const Matrix<const T>& from, int row0) {
        if (!kGeneral || in_chunks(from)) {
            TileLoader<T, kRows, kHeadDim, kThreads>{from, opaque(thread_index())}(to, row0);
        } else {
            load_elements<T, kRows, kHeadDim, kThreads>(to, from, row0);
        }
    }
    FASTATTN_DEVICE void load_keys(int n) const {
        const uint32_t stage = (n & 1) * kStage;
        const int j0 = tiles.at(n) * kTile.keys;
        load<kTile.keys>(smem_base() + kK + stage, key_matrix<const T>(p.k, band, hk, p.head_dim_qk), j0);
        load<kTile.keys>(smem_base() + kV + stage, key_matrix<const T>(p.v, band, hk, p.head_dim_v), j0);
    }

    FASTATTN_DEVICE void run(bool careful) {
        clear(dq);
        const int count = tiles.count();
        if (count == 0) return;
        load<kTile.queries>(smem_base(), query_matrix<const T>(p.q, band, h, p.head_dim_qk), i0);
        load<kTile.queries>(smem_base() + kGradOut, query_matrix<const T>(p.grad_out, band, h, p.head_dim_v), i0);
        load_keys(0);
        cp_async_commit();
        const int looks_at_indices = kGeneral || careful ? count : tiles.masked();
        int n = 0;
        for (; n < looks_at_indices; ++n) step<true>(n, count, careful);
        if (!kGeneral) {
            for (; n < count; ++n) step<false>(n, count, careful);
        }
    }

private:
    template <bool kMasked>
    FASTATTN_DEVICE void step(int n, int count, bool careful) {
        const uint32_t q = opaque(smem_base()), grad_out = q + kGradOut;
        const uint32_t k = q + kK + (n & 1) * kStage, v = q + kV + (n & 1) * kStage;
        const int j0 = (kMasked ? tiles.at(n) : tiles.full(n)) * kTile.keys;
        cp_async_wait<0>();
        barrier();
        if (n + 1 < count) load_keys(n + 1);
        cp_async_commit();
        float s[1][kN][4], dp[1][kN][4];
        clear(s);
        clear(dp);
        multiply_rows<T, kHeadDim, 16>(s, q + Layout::bytes(warp() * 16), k);
        multiply_rows<T, kHeadDim, 16>(dp, grad_out + Layout::bytes(warp() * 16), v);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = row(half);
            const bool exists = i < band.seqlen_q;
            const float lse = exists ? load_global(lse_rows(p) + band.row_index(p, h, i)) : INFINITY;
            const float delta = exists ? load_global(delta_rows(p) + band.row_index(p, h, i)) : 0.f;
            if constexpr (kGeneral) {
                const EntryRules::Row row = gradient.rules.row(h, i);
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    const int j = j0 + 8 * n + fragment_col(0);  // even: one of four random words is for j + 1
                    const Philox4 words = gradient.words(h, i, j);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        gradient(s[0][n][2 * half + e], dp[0][n][2 * half + e], row, j + e, gradient.kept(words, j + e),
                                 lse, delta);
                    }
                }
            } else {
                const int begin = band.keys_begin(i) - j0, end = band.keys_end(i) - j0;
#pragma unroll
                for (int e = 0; e < 2 * kN; ++e) {
                    const int j = 8 * (e / 2) + fragment_col(e % 2);  // from j0
                    const bool visible = !kMasked || (begin <= j && j < end);
                    gradient(s[0][e / 2][2 * half + e % 2], dp[0][e / 2][2 * half + e % 2], visible, lse, delta);
                }
            }
        }
#pragma unroll
        for (int block = 0; block < kTile.keys / 16; ++block) {
            uint32_t ds[1][4];
            pack_fragment<T>(ds[0], dp[0], block);
            const uint32_t rows = k + Layout::bytes(16 * block);
            if (kMasked && careful) {
                multiply_columns_visible<T, kHeadDim, 1>(dq, ds, rows, 0);
            } else {
                multiply_columns<T, kHeadDim, 1>(dq, ds, rows, 0);
            }
        }
    }
};

template <typename T, int kHeadDim, bool kGeneral>
FASTATTN_KERNEL(query_tile(kHeadDim).threads(), 1)
dq_kernel(FASTATTN_CONSTANT AttentionParams p) {
    using Loop = QueryTileLoop<T, kHeadDim, kGeneral>;
    constexpr ForwardTile kTile = Loop::kTile;
    const int64_t tiles_q = (p.seqlen_q + kTile.queries - 1) / kTile.queries;
    const WorkItem work =
        work_item(block_index(), tiles_q, p.batch * p.heads_q, p.seqlen_k * (p.head_dim_qk + p.head_dim_v) * 2);
    const int i0 = static_cast<int>(tiles_q - 1 - work.tile) * kTile.queries;  // the last sees the most keys
    const int b = work.head / static_cast<int>(p.heads_q), h = work.head % static_cast<int>(p.heads_q);
    const Band band = Band::of(p, b);
    if (i0 >= band.seqlen_q) return;
    Loop loop(p, band, b, h, i0);
    loop.run(false);
    if (kGeneral || loop.tiles.masked() > 0) {
        const uint32_t rows = (loop.row(0) < band.seqlen_q ? 1u : 0u) | (loop.row(1) < band.seqlen_q ? 2u : 0u);
        if (barrier_or(any_nonfinite(loop.dq, rows))) loop.run(true);
    }
    cp_async_wait<0>();

    store_rows(query_matrix<T>(p.dq, band, h, p.head_dim_qk), i0 + warp() * 16, loop.dq[0],
               static_cast<float>(p.softmax_scale), [](int n) { return 8 * n; });
}

}  // namespace

template <typename T, int kHeadDim, bool kGeneral>
void dq(const AttentionParams& p, void* stream) {
    constexpr ForwardTile kTile = query_tile(kHeadDim);
    const int64_t tiles = (p.seqlen_q + kTile.queries - 1) / kTile.queries;
    launch(dq_kernel<T, kHeadDim, kGeneral>, {tiles * p.heads_q * p.batch}, kTile.threads(), query_tile_bytes(kHeadDim),
           stream, p);
}

template void dq<FASTATTN_DTYPE, FASTATTN_HEAD_DIM, FASTATTN_GENERAL>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm80
