// Backward over tiles of keys: one block owns dK and dV of a tile and runs over the queries of all heads of the group.
//
// Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T leave the first product as the A operand of dV and
// dK. dS goes through shared memory for dQ, which is added to float sums by atomics unless params.deterministic: then
// dq.cu computes it in a pass of its own.
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

    struct Step {
        int head, turn, stage;  // head: of the group, `heads` after the last step; turn: for tiles.at(); stage: of Q
    };
    FASTATTN_DEVICE Step first() const { return {tiles.count() > 0 ? 0 : heads, 0, 0}; }
    FASTATTN_DEVICE Step after(const Step& step) const {
        const int masked = tiles.masked(), stage = step.stage ^ 1;
        const bool looks_at_indices = step.turn < masked;
        if (step.turn + 1 < (looks_at_indices ? masked : tiles.count())) return {step.head, step.turn + 1, stage};
        if (step.head + 1 < heads) return {step.head + 1, looks_at_indices ? 0 : masked, stage};
        return {looks_at_indices && masked < tiles.count() ? 0 : heads, masked, stage};
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
    const int hk, j0;
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
        FASTATTN_DEVICE uint32_t q_stage(int stage) const { return q + stage * kTile.queries * Layout::kRowBytes; }
        FASTATTN_DEVICE uint32_t row(int stage, int i) const { return rows + (stage * 2 * kTile.queries + i) * 4; }
    };

    float dk[1][kD][4], dv[1][kD][4];

    FASTATTN_DEVICE KeyTileLoop(const AttentionParams& p, const Band& band, int b, int hk, int j0)
        : p(p),
          band(band),
          hk(hk),
          j0(j0),
          steps{kGeneral && p.prefix_lens.data && j0 < band.seqlen_k
                    ? Band::all_tiles(band.seqlen_q, kTile.queries)
                    : band.query_tiles(j0, j0 + kTile.keys - 1, kTile.queries),
                static_cast<int>(p.heads_q) / static_cast<int>(p.heads_k)},
          gradient(p, band, b) {}

    static FASTATTN_DEVICE int first_key() { return warp() / kGroups * 16; }
    static FASTATTN_DEVICE int group() { return warp() % kGroups; }
    FASTATTN_DEVICE int head(const Step& step) const { return hk * steps.heads + step.head; }
    FASTATTN_DEVICE int first_query(const Step& step) const { return steps.tiles.at(step.turn) * kTile.queries; }

    template <int kRows>
    static FASTATTN_DEVICE void load(uint32_t to, const Matrix<const T>& from, int row0) {
        if (!kGeneral || in_chunks(from)) {
            TileLoader<T, kRows, kHeadDim, kThreads>{from, opaque(thread_index())}(to, row0);
        } else {
            load_elements<T, kRows, kHeadDim, kThreads>(to, from, row0);
        }
    }
    FASTATTN_DEVICE void load_q(const Memory& memory, const Step& step) const {
        load<kTile.queries>(memory.q_stage(step.stage), query_matrix<const T>(p.q, band, head(step), p.head_dim_qk),
                            first_query(step));
    }
    FASTATTN_DEVICE void load_grad_out(const Memory& memory, const Step& step) const {
        load<kTile.queries>(memory.grad_out, query_matrix<const T>(p.grad_out, band, head(step), p.head_dim_v),
                            first_query(step));
    }

    // lse and delta of query thread_index() of a step; kept in registers while the step before is at work.
    struct Row {
        float lse, delta;
    };
    FASTATTN_DEVICE Row read_row(const Step& step) const {
        const int thread = opaque(thread_index()), i = first_query(step) + thread;
        if (thread >= kTile.queries || i >= band.seqlen_q) return {INFINITY, 0.f};
        const int64_t at = band.row_index(p, head(step), i);
        return {load_global(lse_rows(p) + at), load_global(delta_rows(p) + at)};
    }
    static FASTATTN_DEVICE void keep_row(const Memory& memory, int stage, const Row& row) {
        const int thread = opaque(thread_index());
        if (thread >= kTile.queries) return;
        store_shared(memory.row(stage, thread), row.lse);
        store_shared(memory.row(stage, kTile.queries + thread), row.delta);
    }

    // All steps, for dK and dV and, unless deterministic, the sums of dQ.
    FASTATTN_DEVICE void run() {
        clear(dv);
        walk<false>(false);
    }
    // All steps again for dK or dV alone, which is left in dk, without forming 0 * NaN.
    FASTATTN_DEVICE void run_careful(bool values) { walk<true>(values); }

private:
    template <bool kCareful>
    FASTATTN_DEVICE void walk(bool values) {
        clear(dk);
        Step at = steps.first();
        if (at.head == steps.heads) return;
        const Memory memory(smem_base());
        load<kTile.keys>(memory.k, key_matrix<const T>(p.k, band, hk, p.head_dim_qk), j0);
        load<kTile.keys>(memory.v, key_matrix<const T>(p.v, band, hk, p.head_dim_v), j0);
        load_q(memory, at);
        load_grad_out(memory, at);
        cp_async_commit();
        keep_row(memory, 0, read_row(at));
        if constexpr (kGeneral || kCareful) {
            while (at.head < steps.heads) at = step<true, kCareful>(at, values);
        } else {
            while (at.head < steps.heads && at.turn < steps.tiles.masked()) at = step<true, false>(at, values);
            while (at.head < steps.heads) at = step<false, false>(at, values);
        }
        cp_async_wait<0>();
    }

    // One step; returns the next.
    template <bool kMasked, bool kCareful>
    FASTATTN_DEVICE Step step(const Step& here, bool values) {
        const Memory memory(opaque(smem_base()));
        const uint32_t q = memory.q_stage(here.stage);
        const Step next = steps.after(here);
        const bool more = next.head < steps.heads;
        Row next_row = {};
        cp_async_wait<0>();
        barrier();
        if (more) {
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
        if constexpr (kCareful) {
#pragma unroll
            for (int e = 0; e < 4 * kN; ++e) dp[0][e / 4][e % 4] = values ? s[0][e / 4][e % 4] : dp[0][e / 4][e % 4];
        }
        store_transposed(memory.ds, dp);
        if constexpr (kGroups > 1 && !kCareful) store_transposed(memory.weights, s);
        if constexpr (kGroups > 1) barrier();
        if constexpr (kCareful) {
            accumulate<true>(dk, dp, memory.ds, values ? memory.grad_out : q);
        } else {
            accumulate<false>(dv, s, memory.weights, memory.grad_out);
            accumulate<false>(dk, dp, memory.ds, q);
        }
        if (more) keep_row(memory, next.stage, next_row);
        barrier();
        if (more) load_grad_out(memory, next);
        cp_async_commit();
        if (!kCareful && !p.deterministic) add_dq<kMasked>(memory, here);
        return next;
    }

    // s: S^T to P^T, dp: dP^T to dS^T.
    template <bool kMasked>
    FASTATTN_DEVICE void differentiate(float (&s)[1][kN][4], float (&dp)[1][kN][4], const Memory& memory,
                                       const Step& here) const {
        const int column = group() * kStepQueries + fragment_col(0), i0 = first_query(here) + column;
        const int key = j0 + first_key() + fragment_row(0);  // of the first half, the other is 8 further
        int begin[2] = {}, end[2] = {};
        if (kMasked && !kGeneral) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                begin[half] = band.queries_begin(key + 8 * half) - i0,
                end[half] = band.queries_end(key + 8 * half) - i0;
            }
        }
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n) {
            const int c = n / 2, pair = n % 2, i = 8 * c + pair;  // from i0
            const float lse = load_shared<float>(memory.row(here.stage, column + i));
            const float delta = load_shared<float>(memory.row(here.stage, kTile.queries + column + i));
            if constexpr (kGeneral) {
                const EntryRules::Row row = gradient.rules.row(head(here), i0 + i);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int j = key + 8 * half;
                    const float kept = gradient.kept(gradient.words(head(here), i0 + i, j), j);
                    gradient(s[0][c][2 * half + pair], dp[0][c][2 * half + pair], row, j, kept, lse, delta);
                }
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const bool visible = !kMasked || (begin[half] <= i && i < end[half]);
                    gradient(s[0][c][2 * half + pair], dp[0][c][2 * half + pair], visible, lse, delta);
                }
            }
        }
    }

    FASTATTN_DEVICE void store_transposed(uint32_t to, const float (&x)[1][kN][4]) const {
#pragma unroll
        for (int c = 0; c < kN; ++c) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                store_shared(
                    to + Square::offset(first_key() + fragment_row(2 * half), group() * kN + c) + 2 * fragment_col(0),
                    pack<T>(x[0][c][2 * half], x[0][c][2 * half + 1]));
            }
        }
    }

    // acc += x^T y, with x from registers where the warp has it, else from shared memory.
    template <bool kCareful>
    FASTATTN_DEVICE void accumulate(float (&acc)[1][kD][4], const float (&x)[1][kN][4], uint32_t shared_x,
                                    uint32_t y) const {
#pragma unroll
        for (int block = 0; block < kTile.queries / 16; ++block) {
            uint32_t a[1][4];
            if constexpr (kGroups == 1) {
                pack_fragment<T>(a[0], x[0], block);
            } else {
                load_fragment<kTile.queries>(a[0], shared_x, first_key(), 16 * block);
            }
            if constexpr (kCareful) {
                multiply_columns_visible<T, kHeadDim, kGroups>(acc, a, y + Layout::bytes(16 * block), group());
            } else {
                multiply_columns<T, kHeadDim, kGroups>(acc, a, y + Layout::bytes(16 * block), group());
            }
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
        float* sums = dq_sums(p) + band.row_index(p, head(here), first_query(here)) * p.head_dim_qk;
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
FASTATTN_KERNEL((KeyTileLoop<T, kHeadDim, kGeneral>::kThreads), 1)
dkdv_kernel(FASTATTN_CONSTANT AttentionParams p) {
    using Loop = KeyTileLoop<T, kHeadDim, kGeneral>;
    constexpr KeyTile kTile = Loop::kTile;
    const int64_t tiles = (p.seqlen_k + kTile.keys - 1) / kTile.keys;
    // The first tile first: under a causal window the most queries see it.
    const WorkItem work =
        work_item(block_index(), tiles, p.batch * p.heads_k, p.seqlen_q * (p.head_dim_qk + p.head_dim_v) * 2);
    const int heads_k = static_cast<int>(p.heads_k), b = work.head / heads_k, hk = work.head % heads_k;
    const Band band = Band::of(p, b);
    const int j0 = work.tile * kTile.keys;
    if (j0 >= room_of(p, b)) return;

    Loop loop(p, band, b, hk, j0);
    loop.run();
    bool again = false;
    if (kGeneral || loop.steps.tiles.masked() > 0) {
        uint32_t rows = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (j0 + Loop::first_key() + fragment_row(2 * half) < band.seqlen_k) rows |= 1u << half;
        }
        again = barrier_or(any_nonfinite(loop.dk, rows) || any_nonfinite(loop.dv, rows));
    }

    const auto store = [&](const Tensor4& to, int64_t cols, const auto& acc, float factor) {
        Matrix<T> matrix = key_matrix<T>(to, band, hk, cols);
        matrix.rows = room_of(p, opaque(b));
        store_rows(matrix, j0 + Loop::first_key(), acc[0], factor,
                   [](int n) { return 8 * (pair_chunk<Loop::kGroups>(n / 2) + n % 2) + 32 * Loop::group(); });
    };
    const float scale = static_cast<float>(p.softmax_scale);
    if (!again) {
        store(p.dv, p.head_dim_v, loop.dv, 1.f);
        store(p.dk, p.head_dim_qk, loop.dk, scale);
        return;
    }
#pragma unroll 1
    for (int values = 0; values < 2; ++values) {
        loop.run_careful(values);
        store(values ? p.dv : p.dk, values ? p.head_dim_v : p.head_dim_qk, loop.dk, values ? 1.f : scale);
    }
}

}  // namespace

template <typename T, int kHeadDim, bool kGeneral>
void dkdv(const AttentionParams& p, void* stream) {
    constexpr KeyTile kTile = KeyTileLoop<T, kHeadDim, kGeneral>::kTile;
    const int64_t tiles = (p.seqlen_k + kTile.keys - 1) / kTile.keys;
    launch(dkdv_kernel<T, kHeadDim, kGeneral>, {tiles * p.heads_k * p.batch}, kTile.threads(),
           kTile.shared_bytes(kHeadDim), stream, p);
}

template void dkdv<FASTATTN_DTYPE, FASTATTN_HEAD_DIM, FASTATTN_GENERAL>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm80
