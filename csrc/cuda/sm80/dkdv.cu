// Backward over tiles of keys: one block owns dK and dV of a tile and runs over the queries of all heads of the group.
//
// Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T leave the first product as the A operand of dV and dK.
// dS goes through shared memory for dQ, which is added to float sums by atomics unless params.deterministic: then dq.cu
// computes it in a pass of its own.
#include "cuda/launch.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/opaque.h"
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
        int n, head, turn;  // head: of the group; turn: for tiles.at()
    };
    FASTATTN_DEVICE Step after(const Step& step) const {
        const int n = step.n + 1;
        if (n == masked()) return {n, 0, tiles.masked()};
        const bool last = step.turn + 1 == (n < masked() ? tiles.masked() : tiles.count());
        if (!last) return {n, step.head, step.turn + 1};
        return {n, step.head + 1, n < masked() ? 0 : tiles.masked()};
    }
};
using Step = Steps::Step;

template <typename T, int kHeadDim, bool kGeneral>
struct KeyTileLoop {
    static constexpr KeyTile kTile = kGeneral ? general_key_tile(kHeadDim) : key_tile(kHeadDim);
    static constexpr int kThreads = kTile.threads(), kGroups = kTile.groups();
    static constexpr int kStepQueries = kTile.queries / kGroups;  // of S^T in one warp
    static constexpr int kN = kStepQueries / 8, kD = kHeadDim / 8 / kGroups;
    using Layout = SwizzledTile<kHeadDim>;
    using Square = SwizzledTile<kTile.queries>;  // rows are keys
    static_assert(kTile.keys % 16 == 0 && kGroups <= 2 && kThreads >= kTile.queries);

    const AttentionParams& p;
    const Band& band;
    const int b, hk, j0;
    const Steps steps;
    const EntryGradient<kGeneral> gradient;

    // The block's shared memory.
    struct Memory {
        uint32_t k, v, q, grad_out, ds, weights, rows;  // rows: [stage][lse, delta][queries]

        FASTATTN_DEVICE explicit Memory(uint32_t base)
            : k(base),
              v(k + kTile.keys * Layout::kRowBytes),
              q(v + kTile.keys * Layout::kRowBytes),
              grad_out(q + 2 * kTile.queries * Layout::kRowBytes),
              ds(grad_out + kTile.queries * Layout::kRowBytes),
              weights(ds + (kGroups - 1) * kTile.keys * Square::kRowBytes),
              rows(weights + kTile.keys * Square::kRowBytes) {}
        FASTATTN_DEVICE uint32_t q_stage(int n) const { return q + (n & 1) * kTile.queries * Layout::kRowBytes; }
        FASTATTN_DEVICE uint32_t row(int n, int i) const { return rows + ((n & 1) * 2 * kTile.queries + i) * 4; }
    };

    float dk[1][kD][4], dv[1][kD][4];

    FASTATTN_DEVICE KeyTileLoop(const AttentionParams& p, const Band& band, int b, int hk, int j0)
        : p(p),
          band(band),
          b(b),
          hk(hk),
          j0(j0),
          steps{kGeneral && p.prefix_lens.data && j0 < band.seqlen_k
                    ? Band::all_tiles(band.seqlen_q, kTile.queries)
                    : band.query_tiles(j0, j0 + kTile.keys - 1, kTile.queries),
                static_cast<int>(p.heads_q) / static_cast<int>(p.heads_k)},
          gradient(p, band) {}

    static FASTATTN_DEVICE int first_key() { return warp() / kGroups * 16; }
    static FASTATTN_DEVICE int group() { return warp() % kGroups; }
    FASTATTN_DEVICE int head(const Step& step) const { return hk * steps.heads + step.head; }
    FASTATTN_DEVICE int first_query(const Step& step) const { return steps.tiles.at(step.turn) * kTile.queries; }

    template <int kRows>
    static FASTATTN_DEVICE void load(uint32_t to, const Matrix<const T>& from, int row0) {
        if (!kGeneral || in_chunks(from)) {
            TileLoader<T, kRows, kHeadDim, kThreads>{from}(to, row0);
        } else {
            load_elements<T, kRows, kHeadDim, kThreads>(to, from, row0);
        }
    }
    FASTATTN_DEVICE void load_q(const Memory& memory, const Step& step) const {
        load<kTile.queries>(memory.q_stage(step.n),
                            head_matrix<const T>(p.q, b, head(step), p.seqlen_q, p.head_dim_qk), first_query(step));
    }
    FASTATTN_DEVICE void load_grad_out(const Memory& memory, const Step& step) const {
        load<kTile.queries>(memory.grad_out,
                            head_matrix<const T>(p.grad_out, b, head(step), p.seqlen_q, p.head_dim_v),
                            first_query(step));
    }

    // lse and delta of query thread_index() of a step; kept in registers while the step before is at work.
    struct Row {
        float lse, delta;
    };
    FASTATTN_DEVICE Row read_row(const Step& step) const {
        const int i = first_query(step) + thread_index();
        if (thread_index() >= kTile.queries || i >= band.seqlen_q) return {INFINITY, 0.f};
        const int64_t at = row_index(p, b, head(step), i);
        return {load_global(lse_rows(p) + at), load_global(delta_rows(p) + at)};
    }
    static FASTATTN_DEVICE void keep_row(const Memory& memory, int n, const Row& row) {
        if (thread_index() >= kTile.queries) return;
        store_shared(memory.row(n, thread_index()), row.lse);
        store_shared(memory.row(n, kTile.queries + thread_index()), row.delta);
    }

    // All steps; `careful` repeats them for dK and dV alone, without forming 0 * NaN.
    FASTATTN_DEVICE void run(bool careful) {
        clear(dk);
        clear(dv);
        const int count = steps.count();
        if (count == 0) return;
        const Memory memory(smem_base());
        load<kTile.keys>(memory.k, head_matrix<const T>(p.k, b, hk, band.seqlen_k, p.head_dim_qk), j0);
        load<kTile.keys>(memory.v, head_matrix<const T>(p.v, b, hk, band.seqlen_k, p.head_dim_v), j0);
        Step at = {0, 0, 0};
        load_q(memory, at);
        load_grad_out(memory, at);
        cp_async_commit();
        keep_row(memory, 0, read_row(at));
        const int looks_at_indices = kGeneral || careful ? count : steps.masked();
        while (at.n < looks_at_indices) at = step<true>(at, count, careful);
        if (!kGeneral) {
            while (at.n < count) at = step<false>(at, count, careful);
        }
    }

private:
    // One step; returns the next.
    template <bool kMasked>
    FASTATTN_DEVICE Step step(const Step& here, int count, bool careful) {
        const Memory memory(opaque(smem_base()));
        const uint32_t q = memory.q_stage(here.n);
        const bool more = here.n + 1 < count;
        Step next = {count, 0, 0};
        Row next_row = {};
        cp_async_wait<0>();
        barrier();
        if (more) {
            next = steps.after(here);
            load_q(memory, next);
            next_row = read_row(next);
        }
        cp_async_commit();

        float s[1][kN][4], dp[1][kN][4];
        clear(s);
        clear(dp);
        const uint32_t own_keys = Layout::bytes(first_key()), own_queries = Layout::bytes(group() * kStepQueries);
        multiply_rows<T, kHeadDim, 16>(s, memory.k + own_keys, q + own_queries);
        multiply_rows<T, kHeadDim, 16>(dp, memory.v + own_keys, memory.grad_out + own_queries);
        differentiate<kMasked>(s, dp, memory, here);
        store_transposed(memory.ds, dp);
        if constexpr (kGroups == 1) {
            accumulate<kMasked>(dv, s, memory.grad_out, careful);
            accumulate<kMasked>(dk, dp, q, careful);
        } else {
            store_transposed(memory.weights, s);
            barrier();
            accumulate_shared<kMasked>(dv, memory.weights, memory.grad_out, careful);
            accumulate_shared<kMasked>(dk, memory.ds, q, careful);
        }
        if (more) keep_row(memory, here.n + 1, next_row);
        barrier();
        if (more) load_grad_out(memory, next);
        cp_async_commit();
        if (!p.deterministic && !careful) add_dq<kMasked>(memory, here);
        return next;
    }

    // s: S^T to P^T, dp: dP^T to dS^T.
    template <bool kMasked>
    FASTATTN_DEVICE void differentiate(float (&s)[1][kN][4], float (&dp)[1][kN][4], const Memory& memory,
                                       const Step& here) const {
        const int column = group() * kStepQueries + fragment_col(0), i0 = first_query(here) + column;
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
                const float lse = load_shared<float>(memory.row(here.n, column + i));
                const float delta = load_shared<float>(memory.row(here.n, kTile.queries + column + i));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool in_window = !kMasked || (begin[half] <= i && i < end[half]);
                    gradient(s[0][c][2 * half + pair], dp[0][c][2 * half + pair], in_window, lse, delta, b,
                             kGeneral ? head(here) : 0, i0 + i, j0 + first_key() + fragment_row(2 * half));
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

    FASTATTN_DEVICE void add_pair(float* row, int col, float low, float high) const {
        if (col + 1 < p.head_dim_qk && p.head_dim_qk % 2 == 0) {
            reduce_add(row + col, low, high);
        } else if (col < p.head_dim_qk) {
            reduce_add(row + col, low);
            if (col + 1 < p.head_dim_qk) reduce_add(row + col + 1, high);
        }
    }

    // dQ of the step's queries, in items of 16 queries x 32 columns.
    template <bool kMasked>
    FASTATTN_DEVICE void add_dq(const Memory& memory, const Step& here) const {
        constexpr int kRowBlocks = kTile.queries / 16, kItems = kRowBlocks * (kHeadDim / 32);
        float* sums = dq_sums(p) + row_index(p, b, head(here), first_query(here)) * p.head_dim_qk;
#pragma unroll 1
        for (int item = warp(); item < kItems; item += kTile.warps) {
            const int row_block = item % kRowBlocks, columns = item / kRowBlocks;
            float dq[1][4][4];
            clear(dq);
#pragma unroll
            for (int block = 0; block < kTile.keys / 16; ++block) {
                uint32_t a[1][4];
                load_transposed_fragment<kTile.queries>(a[0], memory.ds, 16 * row_block, 16 * block);
                multiply_columns<T, kHeadDim, 1>(dq, a, memory.k + Layout::bytes(16 * block), columns);
            }
            if (kMasked && any_lane(any_nonfinite(dq, 3))) {
                clear(dq);
#pragma unroll 1
                for (int block = 0; block < kTile.keys / 16; ++block) {
                    uint32_t a[1][4];
                    load_transposed_fragment<kTile.queries>(a[0], memory.ds, 16 * row_block, 16 * block);
                    multiply_columns_visible<T, kHeadDim, 1>(dq, a, memory.k + Layout::bytes(16 * block), columns);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * row_block + fragment_row(2 * half);
                if (first_query(here) + row >= band.seqlen_q) continue;
                float* to = sums + row * p.head_dim_qk;
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    add_pair(to, 32 * columns + 8 * c + fragment_col(0), dq[0][c][2 * half], dq[0][c][2 * half + 1]);
                }
            }
        }
    }
};

template <typename T, int kHeadDim, bool kGeneral>
FASTATTN_KERNEL((KeyTileLoop<T, kHeadDim, kGeneral>::kThreads), 1) dkdv_kernel(FASTATTN_CONSTANT AttentionParams p) {
    using Loop = KeyTileLoop<T, kHeadDim, kGeneral>;
    constexpr KeyTile kTile = Loop::kTile;
    const int64_t tiles = (p.seqlen_k + kTile.keys - 1) / kTile.keys;
    // The first tile first: under a causal window the most queries see it.
    const WorkItem work = work_item(block_index(), tiles, p.batch * p.heads_k,
                                    p.seqlen_q * (p.head_dim_qk + p.head_dim_v) * 2);
    const int heads_k = static_cast<int>(p.heads_k), b = work.head / heads_k, hk = work.head % heads_k;
    const Band band = Band::of(p, b);
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
    constexpr KeyTile kTile = KeyTileLoop<T, kHeadDim, kGeneral>::kTile;
    const int64_t tiles = (p.seqlen_k + kTile.keys - 1) / kTile.keys;
    launch(dkdv_kernel<T, kHeadDim, kGeneral>, {tiles * p.heads_k * p.batch}, kTile.threads(), kTile.shared_bytes(kHeadDim), stream, p);
}

template void dkdv<FASTATTN_DTYPE, FASTATTN_HEAD_DIM, FASTATTN_GENERAL>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm80
