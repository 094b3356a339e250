// Backward over tiles of keys: one block owns dK and dV of a tile and runs over the queries of all heads of the group.
//
// Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T leave the first product as the A operand of dV and dK.
// dS goes through shared memory for dQ, which is added to float sums by atomics unless params.deterministic: then dq.cu
// computes it in a pass of its own.
#include "cuda/launch.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/scheduler.h"
#include "cuda/sm80/backward.h"
#include "cuda/sm80/kernels.h"

namespace fastattn::cuda::sm80 {
namespace {

// The steps of a block: tiles of queries of each head, first those that look at indices.
struct Steps {
    TileRange tiles;
    int heads;

    FASTATTN_DEVICE int count() const { return heads * tiles.count(); }
    FASTATTN_DEVICE int masked() const { return heads * tiles.masked(); }
    struct Step {
        int head, tile;
    };
    FASTATTN_DEVICE Step at(int n) const {
        const int masked_tiles = tiles.masked(), full_tiles = tiles.count() - masked_tiles;
        if (n < masked()) return {n / masked_tiles, tiles.at(n % masked_tiles)};
        n -= masked();
        return {n / full_tiles, tiles.full(masked_tiles + n % full_tiles)};
    }
};

template <typename T, int kHeadDim, bool kGeneral>
struct KeyTileLoop {
    static constexpr KeyTile kTile = key_tile(kHeadDim);
    static constexpr int kThreads = kTile.threads(), kGroups = kTile.groups();
    static constexpr int kStepQueries = kTile.queries / kGroups;  // of S^T in one warp
    static constexpr int kN = kStepQueries / 8, kD = kHeadDim / 8 / kGroups;
    using Layout = SwizzledTile<kHeadDim>;
    using Square = SwizzledTile<kTile.queries>;  // rows are keys
    static_assert(kTile.keys % 16 == 0 && kGroups <= 2 && kThreads >= kTile.queries);

    const AttentionParams& p;
    const Band& band;
    const int64_t b, hk;
    const int j0;
    const Steps steps;
    const EntryGradient<kGeneral> gradient;

    const uint32_t k = smem_base();
    const uint32_t v = k + kTile.keys * Layout::kRowBytes, q = v + kTile.keys * Layout::kRowBytes;
    const uint32_t grad_out = q + 2 * kTile.queries * Layout::kRowBytes;
    const uint32_t ds = grad_out + kTile.queries * Layout::kRowBytes;
    const uint32_t weights = ds + (kGroups - 1) * kTile.keys * Square::kRowBytes;
    const uint32_t rows = weights + kTile.keys * Square::kRowBytes;  // [stage][lse, delta][queries]

    float dk[1][kD][4], dv[1][kD][4];

    FASTATTN_DEVICE KeyTileLoop(const AttentionParams& p, const Band& band, int64_t b, int64_t hk, int j0)
        : p(p),
          band(band),
          b(b),
          hk(hk),
          j0(j0),
          steps{band.query_tiles(j0, j0 + kTile.keys - 1, kTile.queries), static_cast<int>(p.heads_q / p.heads_k)},
          gradient(p) {}

    static FASTATTN_DEVICE int first_key() { return warp() / kGroups * 16; }
    static FASTATTN_DEVICE int group() { return warp() % kGroups; }
    FASTATTN_DEVICE int64_t head(int n) const { return hk * steps.heads + steps.at(n).head; }
    FASTATTN_DEVICE int first_query(int n) const { return steps.at(n).tile * kTile.queries; }

    template <int kRows>
    static FASTATTN_DEVICE void load(uint32_t to, const Matrix<const T>& from, int row0) {
        if (!kGeneral || in_chunks(from)) {
            TileLoader<T, kRows, kHeadDim, kThreads>{from}(to, row0);
        } else {
            load_elements<T, kRows, kHeadDim, kThreads>(to, from, row0);
        }
    }
    FASTATTN_DEVICE void load_q(int n) const {
        load<kTile.queries>(q + (n & 1) * kTile.queries * Layout::kRowBytes,
                            head_matrix<const T>(p.q, b, head(n), p.seqlen_q, p.head_dim_qk), first_query(n));
    }
    FASTATTN_DEVICE void load_grad_out(int n) const {
        load<kTile.queries>(grad_out, head_matrix<const T>(p.grad_out, b, head(n), p.seqlen_q, p.head_dim_v),
                            first_query(n));
    }
    FASTATTN_DEVICE uint32_t row_address(int n, int row) const { return rows + ((n & 1) * 2 * kTile.queries + row) * 4; }

    // lse and delta of query thread_index() of step n; to be kept in registers while the step before is at work.
    struct Row {
        float lse, delta;
    };
    FASTATTN_DEVICE Row read_row(int n) const {
        const int i = first_query(n) + thread_index();
        if (thread_index() >= kTile.queries || i >= band.seqlen_q) return {INFINITY, 0.f};
        const int64_t at = row_index(p, b, head(n), i);
        return {load_global(lse_rows(p) + at), load_global(delta_rows(p) + at)};
    }
    FASTATTN_DEVICE void keep_row(int n, const Row& row) const {
        if (thread_index() >= kTile.queries) return;
        store_shared(row_address(n, thread_index()), row.lse);
        store_shared(row_address(n, kTile.queries + thread_index()), row.delta);
    }

    // All steps; `careful` repeats them for dK and dV alone, without forming 0 * NaN.
    FASTATTN_DEVICE void run(bool careful) {
        clear(dk);
        clear(dv);
        const int count = steps.count(), masked = steps.masked();
        if (count == 0) return;
        load<kTile.keys>(k, head_matrix<const T>(p.k, b, hk, p.seqlen_k, p.head_dim_qk), j0);
        load<kTile.keys>(v, head_matrix<const T>(p.v, b, hk, p.seqlen_k, p.head_dim_v), j0);
        load_q(0);
        load_grad_out(0);
        cp_async_commit();
        keep_row(0, read_row(0));
        const int looks_at_indices = kGeneral || careful ? count : masked;
        int n = 0;
        for (; n < looks_at_indices; ++n) step<true>(n, count, careful);
        if (!kGeneral) {
            for (; n < count; ++n) step<false>(n, count, careful);
        }
    }

private:
    template <bool kMasked>
    FASTATTN_DEVICE void step(int n, int count, bool careful) {
        const uint32_t q_tile = q + (n & 1) * kTile.queries * Layout::kRowBytes;
        cp_async_wait<0>();
        barrier();
        Row next_row = {};
        if (n + 1 < count) {
            load_q(n + 1);
            next_row = read_row(n + 1);
        }
        cp_async_commit();

        float s[1][kN][4], dp[1][kN][4];
        clear(s);
        clear(dp);
        const uint32_t own_keys = Layout::bytes(first_key()), own_queries = Layout::bytes(group() * kStepQueries);
        multiply_rows<T, kHeadDim, 16>(s, k + own_keys, q_tile + own_queries);
        multiply_rows<T, kHeadDim, 16>(dp, v + own_keys, grad_out + own_queries);
        differentiate<kMasked>(s, dp, n);
        store_transposed(ds, dp);
        if constexpr (kGroups == 1) {
            accumulate<kMasked>(dv, s, grad_out, careful);
            accumulate<kMasked>(dk, dp, q_tile, careful);
        } else {
            store_transposed(weights, s);
            barrier();
            accumulate_shared<kMasked>(dv, weights, grad_out, careful);
            accumulate_shared<kMasked>(dk, ds, q_tile, careful);
        }
        if (n + 1 < count) keep_row(n + 1, next_row);
        barrier();
        if (n + 1 < count) load_grad_out(n + 1);
        cp_async_commit();
        if (!p.deterministic && !careful) add_dq<kMasked>(n);
    }

    // s: S^T to P^T, dp: dP^T to dS^T.
    template <bool kMasked>
    FASTATTN_DEVICE void differentiate(float (&s)[1][kN][4], float (&dp)[1][kN][4], int n) const {
        const int column = group() * kStepQueries + fragment_col(0), i0 = first_query(n) + column;
        int begin[2] = {}, end[2] = {};
        if (kMasked) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int j = j0 + first_key() + fragment_row(2 * half);
                begin[half] = band.queries_begin(j) - i0, end[half] = band.queries_end(j) - i0;
            }
        }
#pragma unroll
        for (int c = 0; c < kN; ++c) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int i = 8 * c + pair;  // from i0
                const float lse = load_shared<float>(row_address(n, column + i));
                const float delta = load_shared<float>(row_address(n, kTile.queries + column + i));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool visible = !kMasked || (begin[half] <= i && i < end[half]);
                    gradient(s[0][c][2 * half + pair], dp[0][c][2 * half + pair], visible, lse, delta, b,
                             kGeneral ? head(n) : 0, i0 + i, j0 + first_key() + fragment_row(2 * half));
                }
            }
        }
    }

    FASTATTN_DEVICE void store_transposed(uint32_t to, const float (&x)[1][kN][4]) const {
#pragma unroll
        for (int c = 0; c < kN; ++c) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                store_shared(to + Square::offset(first_key() + fragment_row(2 * half), group() * kN + c) +
                                 2 * fragment_col(0),
                             pack<T>(x[0][c][2 * half], x[0][c][2 * half + 1]));
            }
        }
    }

    template <bool kMasked>
    FASTATTN_DEVICE void accumulate(float (&acc)[1][kD][4], const float (&x)[1][kN][4], uint32_t y, bool careful) const {
#pragma unroll
        for (int block = 0; block < kN / 2; ++block) {
            uint32_t a[1][4];
            pack_fragment<T>(a[0], x[0], block);
            multiply<kMasked>(acc, a, y + Layout::bytes(16 * block), careful);
        }
    }
    template <bool kMasked>
    FASTATTN_DEVICE void accumulate_shared(float (&acc)[1][kD][4], uint32_t x, uint32_t y, bool careful) const {
#pragma unroll
        for (int block = 0; block < kTile.queries / 16; ++block) {
            uint32_t a[1][4];
            load_fragment<kTile.queries>(a[0], x, first_key(), 16 * block);
            multiply<kMasked>(acc, a, y + Layout::bytes(16 * block), careful);
        }
    }
    template <bool kMasked>
    static FASTATTN_DEVICE void multiply(float (&acc)[1][kD][4], const uint32_t (&a)[1][4], uint32_t y, bool careful) {
        if (kMasked && careful) {
            multiply_columns_visible<T, kHeadDim, kGroups>(acc, a, y, group());
        } else {
            multiply_columns<T, kHeadDim, kGroups>(acc, a, y, group());
        }
    }

    // dQ of the step's queries, in items of 16 queries x 32 columns.
    template <bool kMasked>
    FASTATTN_DEVICE void add_dq(int n) const {
        constexpr int kRowBlocks = kTile.queries / 16, kItems = kRowBlocks * (kHeadDim / 32);
        float* sums = dq_sums(p) + row_index(p, b, head(n), first_query(n)) * p.head_dim_qk;
#pragma unroll 1
        for (int item = warp(); item < kItems; item += kTile.warps) {
            const int row_block = item % kRowBlocks, columns = item / kRowBlocks;
            float dq[1][4][4];
            clear(dq);
#pragma unroll
            for (int block = 0; block < kTile.keys / 16; ++block) {
                uint32_t a[1][4];
                load_transposed_fragment<kTile.queries>(a[0], ds, 16 * row_block, 16 * block);
                multiply_columns<T, kHeadDim, 1>(dq, a, k + Layout::bytes(16 * block), columns);
            }
            if (kMasked && any_lane(any_nonfinite(dq, 3))) {
                clear(dq);
#pragma unroll 1
                for (int block = 0; block < kTile.keys / 16; ++block) {
                    uint32_t a[1][4];
                    load_transposed_fragment<kTile.queries>(a[0], ds, 16 * row_block, 16 * block);
                    multiply_columns_visible<T, kHeadDim, 1>(dq, a, k + Layout::bytes(16 * block), columns);
                }
            }
#pragma unroll
            for (int e = 0; e < 16; ++e) {
                const int row = 16 * row_block + fragment_row(e % 4);
                const int col = 32 * columns + 8 * (e / 4) + fragment_col(e % 4);
                if (first_query(n) + row < band.seqlen_q && col < p.head_dim_qk) {
                    reduce_add(sums + row * p.head_dim_qk + col, dq[0][e / 4][e % 4]);
                }
            }
        }
    }
};

template <typename T, int kHeadDim, bool kGeneral>
FASTATTN_KERNEL(key_tile(kHeadDim).threads(), 1) dkdv_kernel(FASTATTN_CONSTANT AttentionParams p) {
    using Loop = KeyTileLoop<T, kHeadDim, kGeneral>;
    constexpr KeyTile kTile = Loop::kTile;
    const Band band = Band::of(p);
    const int64_t tiles = (p.seqlen_k + kTile.keys - 1) / kTile.keys;
    // The first tile first: under a causal window the most queries see it.
    const WorkItem work = work_item(block_index(), tiles, p.batch * p.heads_k,
                                    p.seqlen_q * (p.head_dim_qk + p.head_dim_v) * 2 * p.heads_q / p.heads_k);
    const int64_t b = work.head / p.heads_k, hk = work.head % p.heads_k;
    const int j0 = work.tile * kTile.keys;

    Loop loop(p, band, b, hk, j0);
    loop.run(false);
    if (kGeneral || loop.steps.masked() > 0) {
        uint32_t rows = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (j0 + Loop::first_key() + fragment_row(2 * half) < band.seqlen_k) rows |= 1u << half;
        }
        if (barrier_or(any_nonfinite(loop.dk, rows) || any_nonfinite(loop.dv, rows))) loop.run(true);
    }
    cp_async_wait<0>();

    const Matrix<T> dk = head_matrix<T>(p.dk, b, hk, p.seqlen_k, p.head_dim_qk);
    const Matrix<T> dv = head_matrix<T>(p.dv, b, hk, p.seqlen_k, p.head_dim_v);
    const float scale = static_cast<float>(p.softmax_scale);
#pragma unroll
    for (int n = 0; n < Loop::kD; ++n) {
        const int col = 8 * (pair_chunk<Loop::kGroups>(n / 2) + n % 2) + 32 * Loop::group() + fragment_col(0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = j0 + Loop::first_key() + fragment_row(2 * half);
            store_pair(dk, row, col, scale * loop.dk[0][n][2 * half], scale * loop.dk[0][n][2 * half + 1]);
            store_pair(dv, row, col, loop.dv[0][n][2 * half], loop.dv[0][n][2 * half + 1]);
        }
    }
}

}  // namespace

template <typename T, int kHeadDim, bool kGeneral>
void dkdv(const AttentionParams& p, void* stream) {
    constexpr KeyTile kTile = key_tile(kHeadDim);
    const int64_t tiles = (p.seqlen_k + kTile.keys - 1) / kTile.keys;
    launch(dkdv_kernel<T, kHeadDim, kGeneral>, {tiles * p.heads_k * p.batch}, kTile.threads(), kTile.shared_bytes(kHeadDim), stream, p);
}

template void dkdv<FASTATTN_DTYPE, FASTATTN_HEAD_DIM, FASTATTN_GENERAL>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm80
