// Backward for Hopper over tiles of keys: one warpgroup copies tiles by TMA, two multiply them with wgmma.
//
// A block owns dK and dV of 128 keys, a computing warpgroup those of 64, and runs over the queries of all heads of the
// group. Scores are computed transposed, so that P^T and dS^T leave one product as the operand A of the next:
//
//     S^T = K Q^T;  dP^T = V dO^T;  P^T = exp(S^T - lse);  dS^T = P^T * (dP^T - delta)
//     dV += P^T dO;  dK += dS^T Q;  dQ += dS K
//
// dS goes through shared memory for dQ, which is computed in parts of 64 x 64 (head_dim 128: one for each warpgroup,
// 64: the warpgroups take turns) and added to float sums in the workspace, unless params.deterministic: then dq.h
// has a pass of its own for dQ.
//
// Wide heads (head_dim 192 and 256): the registers hold dK and dV of 64 keys only, of which each warpgroup owns half of
// the columns, and dQ's. It computes S^T and dP^T of half of the queries; P^T and dS^T become whole in shared memory,
// where all three products take them from.
#pragma once

#include "cuda/band.h"
#include "cuda/ptx/arithmetic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/shared.h"
#include "cuda/sm90/contain.h"
#include "cuda/sm90/gradient_sums.h"
#include "cuda/sm90/operand.h"
#include "cuda/sm90/tiles.h"

namespace fastattn::cuda::sm90 {

struct BackwardArguments {
    TensorMap q, k, v, grad_out, dk, dv;  // boxes: one span of all rows of a tile; of 64 rows for dk and dv
    float* sums;                          // gradient_sums.h
    AttentionParams params;
};

template <typename T, int kHeadDim, bool kRagged>
struct Backward {
    static constexpr KeyTile kTile = key_tile(kHeadDim);
    static constexpr bool kWide = kTile.wide;
    static constexpr int kThreads = 384, kStages = 2, kSharedBytes = kTile.shared_bytes(kHeadDim);
    static constexpr int kValueDim = value_dim(kHeadDim), kShares = kWide ? 2 : 1;
    // What a warpgroup owns of dK, of dV, and of the queries of S^T.
    static constexpr int kKeyCols = kHeadDim / kShares, kValueCols = kValueDim / kShares;
    static constexpr int kQueries = kTile.queries / kShares, kCount = kQueries / 2;
    using OwnKeys = Operand<kTile.keys, kKeyCols>;
    using OwnValues = Operand<kTile.keys, kValueCols>;
    using Queries = Operand<kTile.queries, kHeadDim, OwnKeys::kSpan>;
    using Grads = Operand<kTile.queries, kValueDim, OwnValues::kSpan>;  // dO
    using Keys = Operand<kTile.keys, kHeadDim, OwnKeys::kSpan>;
    using Values = Operand<kTile.keys, kValueDim, OwnValues::kSpan>;
    using Scores = Operand<kTile.keys, kTile.queries>;
    using Sums = GradientSums<kHeadDim, kRagged>;
    static constexpr int kSumsCols = OwnKeys::kSpan, kSumsBytes = 4 * 64 * kSumsCols;  // of dQ on their way at a time
    using Fragments = uint32_t[kQueries / 16][4];                                      // P^T or dS^T as operand A
    static_assert(kTile.keys == (kWide ? 64 : 128) && kTile.queries == 64 && kSharedBytes <= 227 * 1024);

    static constexpr int kScoresReady = 1, kGroup = 2;  // named barriers: of both warpgroups, and one for each

    const BackwardArguments& arguments;
    const AttentionParams& p = arguments.params;
    const int heads = static_cast<int>(p.heads_q / p.heads_k);
    const uint32_t k = smem_base(), v = k + Keys::kBytes, q = v + Values::kBytes;
    const uint32_t grad_out = q + kStages * Queries::kBytes, scores = grad_out + kTile.grad_stages * Grads::kBytes;
    const uint32_t weights = scores + kStages * Scores::kBytes;              // wide: P
    const uint32_t sums = weights + (kWide ? kStages : 0) * Scores::kBytes;  // [warpgroup][64 x 64 floats at most]
    const uint32_t rows = sums + 2 * 4 * 64 * 64;                            // [stage][lse log2(e), delta][queries]
    const uint32_t barriers = rows + kStages * 8 * kTile.queries;
    Band band;  // of the sequence
    int hk, j0;
    int room;         // keys in the tensor, of which a sequence may use fewer: the others have gradient 0
    int first_sums;   // the number of the sequence's first tile in the sums of dQ
    TileRange tiles;  // of queries

    FASTATTN_DEVICE explicit Backward(const BackwardArguments& arguments) : arguments(arguments) {
        const auto numbers = SequenceTiles<kTile.keys, kRagged>::of_keys(p);
        const auto [b, head, tile] = SequenceTile::of(block_index(), numbers, p.heads_k,
                                                      p.seqlen_q * (p.head_dim_qk + p.head_dim_v) * 2 * heads);
        band = Band::of<kRagged>(p, b);
        hk = head, j0 = tile * kTile.keys;  // the first is seen by the most queries
        room = kRagged ? room_of(p, b) : band.seqlen_k;
        first_sums = SequenceTiles<kTile.queries, kRagged>::of_queries(p).first(b);
        tiles = band.query_tiles(j0, j0 + kTile.keys - 1, kTile.queries);
    }

    // Whether there is anything to do.
    FASTATTN_DEVICE bool exists() const { return !kRagged || j0 < room; }

    FASTATTN_DEVICE uint32_t kv_full() const { return barriers; }
    FASTATTN_DEVICE uint32_t q_full(int stage) const { return barriers + 8 + 8 * stage; }
    FASTATTN_DEVICE uint32_t grad_full(int stage) const { return q_full(stage) + 8 * kStages; }
    FASTATTN_DEVICE uint32_t empty(int stage) const { return q_full(stage) + 16 * kStages; }
    // Of the one stage of dO, whose rounds alternate like the stages of Q.
    static constexpr bool kOneGrad = kTile.grad_stages == 1;
    static_assert(!kOneGrad || kStages == 2, "their parity is the number of a stage of Q");
    FASTATTN_DEVICE uint32_t grad_empty() const { return grad_full(1); }
    static FASTATTN_DEVICE int grad_stage(const RingPlace<kStages>& place) { return kOneGrad ? 0 : place.stage; }
    static FASTATTN_DEVICE uint32_t grad_parity(const RingPlace<kStages>& place) {
        return kOneGrad ? place.stage : place.parity;
    }
    FASTATTN_DEVICE uint32_t row_address(int stage) const { return rows + stage * 8 * kTile.queries; }

    FASTATTN_DEVICE void initialize() const {
        mbarrier_init(kv_full(), 1);
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(q_full(stage), 1);
            mbarrier_init(grad_full(stage), kOneGrad && stage == 1 ? 8 : 1);  // grad_empty()
            mbarrier_init(empty(stage), 8);                                   // one arrival per warp
        }
        fence_mbarrier_init();
    }

    // One warp: all loads.
    FASTATTN_DEVICE void produce() const {
        if (tiles.count() == 0) return;
        if (lane_index() == 0) {
            mbarrier_arrive_expect_tx(kv_full(), Keys::kBytes + Values::kBytes);
            Keys::load(k, arguments.k, kv_full(), band.first_k + j0, hk, band.batch);
            Values::load(v, arguments.v, kv_full(), band.first_k + j0, hk, band.batch);
        }
        RingPlace<kStages> place;
        for (int head = 0; head < heads; ++head) {
            const int h = hk * heads + head;
            for (int n = 0; n < tiles.count(); ++n, place.advance()) {
                const int i0 = tiles.at(n) * kTile.queries;
                mbarrier_wait(empty(place.stage), place.parity ^ 1);
                load_rows(place.stage, h, i0);
                warp_barrier();
                if (lane_index() != 0) continue;
                const int row = band.first_q + i0;
                mbarrier_arrive_expect_tx(q_full(place.stage), Queries::kBytes);
                Queries::load(q + place.stage * Queries::kBytes, arguments.q, q_full(place.stage), row, h, band.batch);
                const int stage = grad_stage(place);
                if (kOneGrad) mbarrier_wait(grad_empty(), grad_parity(place) ^ 1);
                mbarrier_arrive_expect_tx(grad_full(stage), Grads::kBytes);
                Grads::load(grad_out + stage * Grads::kBytes, arguments.grad_out, grad_full(stage), row, h, band.batch);
            }
        }
    }

    FASTATTN_DEVICE void consume() const {
        const int group = thread_index() / 128 - 1;
        float dk[kKeyCols / 2], dv[kValueCols / 2];
#pragma unroll
        for (int n = 0; n < kKeyCols / 2; ++n) dk[n] = 0.f;
#pragma unroll
        for (int n = 0; n < kValueCols / 2; ++n) dv[n] = 0.f;
        if (tiles.count() > 0) {
            mbarrier_wait(kv_full(), 0);
            if (kRagged && j0 + kTile.keys > band.seqlen_k) clear_keys();
            RingPlace<kStages> place;
            for (int head = 0; head < heads; ++head) {
                const int h = hk * heads + head;
                int n = 0;
                for (; n < tiles.masked(); ++n) step<true>(group, h, n, dk, dv, place);
                for (; n < tiles.count(); ++n) step<false>(group, h, n, dk, dv, place);
            }
        }
        finish(group, dk, dv);
    }

private:
    // Of a warpgroup: the first of its 64 keys, of its queries, of its columns of dK or dQ and of dV.
    static FASTATTN_DEVICE int first_key(int group) { return kWide ? 0 : 64 * group; }
    static FASTATTN_DEVICE int first_query(int group) { return kWide ? kQueries * group : 0; }
    static FASTATTN_DEVICE int key_col(int group) { return kWide ? kKeyCols * group : 0; }
    static FASTATTN_DEVICE int value_col(int group) { return kWide ? kValueCols * group : 0; }

    // Keys behind the sequence's last are anything, and 0 * inf is NaN: they become 0.
    FASTATTN_DEVICE void clear_keys() const {
        Keys::clear_rows(k, band.seqlen_k - j0, thread_index() - 128, 256);
        Values::clear_rows(v, band.seqlen_k - j0, thread_index() - 128, 256);
        fence_proxy_async();
        named_barrier_sync(kScoresReady, 256);
    }

    // lse and delta of a tile of queries; those that do not exist have P = 0.
    FASTATTN_DEVICE void load_rows(int stage, int h, int i0) const {
        const int64_t first = band.row_index(p, h, 0);
#pragma unroll 1
        for (int row = lane_index(); row < kTile.queries; row += 32) {
            const int i = i0 + row;
            const bool exists = i < band.seqlen_q;
            const float lse = exists ? load_global(lse_rows(p) + first + i) : INFINITY;
            const float delta = exists ? load_global(delta_rows(p) + first + i) : 0.f;
            store_shared(row_address(stage) + 4 * row, lse * kLog2E);
            store_shared(row_address(stage) + 4 * (kTile.queries + row), delta);
        }
    }

    // Starts d = the warpgroup's rows of a, times the transpose of its rows of b.
    template <typename A, typename B>
    static FASTATTN_DEVICE void multiply_rows(float (&d)[kCount], uint32_t a, uint32_t b, int group) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < A::kSpans * A::kSpan / 16; ++step) {
            wgmma_ss<T, kQueries>(d, A::k_major(a, first_key(group), step), B::k_major(b, first_query(group), step),
                                  step > 0);
        }
        wgmma_commit();
    }
    // Starts d += a b, or the columns of b from col on.
    template <typename B, int kSize>
    static FASTATTN_DEVICE void multiply_columns(float (&d)[kSize], const Fragments& a, uint32_t b) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTile.queries / 16; ++step) {
            wgmma_rs<T, 2 * kSize, true>(d, a[step], B::mn_major(b, 0, step), true);
        }
        wgmma_commit();
    }
    template <typename B, int kSize>
    static FASTATTN_DEVICE void multiply_columns(float (&d)[kSize], uint32_t a, uint32_t b, int col) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTile.queries / 16; ++step) {
            wgmma_ss<T, 2 * kSize, false, true>(d, Scores::k_major(a, 0, step), B::mn_major(b, col, step), true);
        }
        wgmma_commit();
    }
    // Starts dq = the columns of dS K from col on.
    template <int kSize>
    FASTATTN_DEVICE void multiply_scores(float (&dq)[kSize], uint32_t ds, int col) const {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTile.keys / 16; ++step) {
            wgmma_ss<T, 2 * kSize, true, true>(dq, Scores::mn_major(ds, 0, step), Keys::mn_major(k, col, step),
                                               step > 0);
        }
        wgmma_commit();
    }

    // Writes the warpgroup's entries of P^T or dS^T to a tile that both may read then.
    static FASTATTN_DEVICE void share(uint32_t tile, const Fragments& a, int group) {
#pragma unroll
        for (int c = 0; c < kQueries / 8; ++c) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_key(group) + fragment_row() + 8 * half;
                const uint32_t address = Scores::address(tile, row, first_query(group) / 8 + c);
                store_shared(address + 2 * fragment_col(), a[c / 2][c % 2 * 2 + half]);
            }
        }
        fence_proxy_async();
        named_barrier_sync(kScoresReady, 256);
    }

    // A bit for each of a lane's 16 columns 8 c + e, set where that is less than end.
    static FASTATTN_DEVICE uint32_t entries_before(int end) {
        const int count = end <= 0 ? 0 : min32(end / 8 * 2 + min32(end % 8, 2), 16);
        return (1u << count) - 1;
    }

    template <bool kMasked>
    FASTATTN_DEVICE void step(int group, int h, int n, float (&dk)[kKeyCols / 2], float (&dv)[kValueCols / 2],
                              RingPlace<kStages>& place) const {
        const int tile = tiles.at(n), stage = place.stage;
        const uint32_t q_tile = q + stage * Queries::kBytes, grad_tile = grad_out + grad_stage(place) * Grads::kBytes;
        const uint32_t ds = scores + stage * Scores::kBytes;  // the other ones may still be read
        const uint32_t shared_weights = weights + stage * Scores::kBytes;
        float s[kCount], dp[kCount];
        Fragments a, kept, da;

        mbarrier_wait(q_full(stage), place.parity);
        multiply_rows<Keys, Queries>(s, k, q_tile, group);
        mbarrier_wait(grad_full(grad_stage(place)), grad_parity(place));
        multiply_rows<Values, Grads>(dp, v, grad_tile, group);

        const int column = first_query(group) + fragment_col();
        uint32_t visible = 0;  // bit 16 half + 2 c + e: query 8 c + e from here
        if (kMasked) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int j = j0 + first_key(group) + fragment_row() + 8 * half, i0 = tile * kTile.queries + column;
                visible |= (entries_before(band.queries_end(j) - i0) & ~entries_before(band.queries_begin(j) - i0))
                           << 16 * half;
            }
        }
        const float unit = static_cast<float>(p.softmax_scale) * kLog2E;

        wgmma_wait<1>(s);
        // dV += P^T dO, of 16 queries as soon as their P is there: P is computed beside dP^T, dS^T beside dV, and as
        // each depends on what is before it, the compiler cannot move them behind the next wait.
#pragma unroll
        for (int step = 0; step < kQueries / 16; ++step) {
#pragma unroll
            for (int c = 2 * step; c < 2 * step + 2; ++c) {
                const Float2 lse = load_shared<Float2>(row_address(stage) + 4 * (8 * c + column));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& x = s[4 * c + 2 * half];
                    float& y = s[4 * c + 2 * half + 1];
                    x = exp2_approx(fmaf(x, unit, -lse.x));
                    y = exp2_approx(fmaf(y, unit, -lse.y));
                    if (kMasked && !(visible >> (16 * half + 2 * c) & 1)) x = 0.f;
                    if (kMasked && !(visible >> (16 * half + 2 * c + 1) & 1)) y = 0.f;
                }
            }
            pack_operand<T>(a[step], s, step);
            // From here on only the rounded P: S, dP, dK and dV leave no registers for both.
#pragma unroll
            for (int r = 0; r < 4; ++r) kept[step][r] = a[step][r];  // a is not to be touched before the wait for dV
            if constexpr (!kWide) {
                wgmma_fence();
                wgmma_rs<T, kValueDim, true>(dv, a[step], Grads::mn_major(grad_tile, 0, step), true);
            }
        }
        if constexpr (kWide) {
            share(shared_weights, a, group);
            multiply_columns<Grads>(dv, shared_weights, grad_tile, value_col(group));
        } else {
            wgmma_commit();
        }

        wgmma_wait<1>(dp);
#pragma unroll
        for (int c = 0; c < kQueries / 8; ++c) {
            const Float2 delta = load_shared<Float2>(row_address(stage) + 4 * (kTile.queries + 8 * c + column));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Float2 weight = unpack<T>(kept[c / 2][c % 2 * 2 + half]);
                float& x = dp[4 * c + 2 * half];
                float& y = dp[4 * c + 2 * half + 1];
                x = weight.x * (x - delta.x);  // invisible: 0, or NaN, which redo() contains
                y = weight.y * (y - delta.y);
            }
        }
#pragma unroll
        for (int step = 0; step < kQueries / 16; ++step) pack_operand<T>(da[step], dp, step);
        if constexpr (kWide) {
            share(ds, da, group);
            if (p.deterministic) {
                multiply_columns<Queries>(dk, ds, q_tile, key_col(group));
            } else {
                // At 256 in two parts: dK, dV and 128 columns of dQ leave no registers for addresses.
                constexpr int kPartCols = kKeyCols == 128 ? 64 : kKeyCols;
                float dq[kPartCols / 2];
                multiply_scores(dq, ds, key_col(group));
                multiply_columns<Queries>(dk, ds, q_tile, key_col(group));
                wgmma_wait<1>(dv, dq);
                if (kOneGrad && lane_index() == 0) mbarrier_arrive(grad_empty());
                add_dq(dq, group, h, tile, key_col(group));
                if constexpr (kPartCols < kKeyCols) {
                    multiply_scores(dq, ds, key_col(group) + kPartCols);
                    wgmma_wait<0>(dq);
                    add_dq(dq, group, h, tile, key_col(group) + kPartCols);
                }
            }
        } else if (p.deterministic) {
            multiply_columns<Queries>(dk, da, q_tile);
        } else {
            share(ds, da, group);
            if (kHeadDim == 128 || group == stage) {
                const int col = kHeadDim == 128 ? 64 * group : 0;
                float dq[32];
                multiply_scores(dq, ds, col);
                multiply_columns<Queries>(dk, da, q_tile);
                wgmma_wait<1>(dv, dq);
                add_dq(dq, group, h, tile, col);
            } else {
                multiply_columns<Queries>(dk, da, q_tile);
            }
        }
        wgmma_wait<0>(dv, dk);
        if (kOneGrad && p.deterministic && lane_index() == 0) mbarrier_arrive(grad_empty());
        if (lane_index() == 0) mbarrier_arrive(empty(stage));
        place.advance();
    }

    // Hands the columns of a tile of dQ from col on to the unit that adds them to global memory.
    template <int kSize>
    FASTATTN_DEVICE void add_dq(const float (&dq)[kSize], int group, int h, int tile, int col) const {
        const uint32_t from = sums + group * 4 * 64 * 64;
        const int thread = thread_index() % 128;
#pragma unroll
        for (int first = 0; first < 2 * kSize; first += kSumsCols) {
            if (thread == 0) bulk_wait_read<0>();
            named_barrier_sync(kGroup + group, 128);
#pragma unroll
            for (int c = 0; c < kSumsCols / 8; ++c) {
                const float* d = &dq[first / 2 + 4 * c];
                store_shared(from + 16 * (128 * c + thread), Float4{d[0], d[1], d[2], d[3]});
            }
            fence_proxy_async();
            named_barrier_sync(kGroup + group, 128);
            if (thread == 0) {
                bulk_reduce_add(Sums::columns(arguments.sums, p, h, first_sums + tile, col + first), from, kSumsBytes);
                bulk_commit();
            }
        }
    }

    // Writes dK and dV through the tiles of K and V, which nothing reads any more.
    FASTATTN_DEVICE void finish(int group, const float (&dk)[kKeyCols / 2], const float (&dv)[kValueCols / 2]) const {
        const uint32_t own_k = k + (kWide ? group * OwnKeys::kBytes : 0);
        const uint32_t own_v = v + (kWide ? group * OwnValues::kBytes : 0);
        named_barrier_sync(kScoresReady, 256);
        bool broken = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_key(group) + fragment_row() + 8 * half;
            float check = 0.f;
            write_row<OwnKeys>(own_k, row, half, dk, static_cast<float>(p.softmax_scale), check);
            write_row<OwnValues>(own_v, row, half, dv, 1.f, check);
            broken = broken || (check != 0.f && j0 + row < room);
        }
        if (tiles.masked() > 0 && any_lane(broken)) redo(group, own_k, own_v);
        fence_proxy_async();
        named_barrier_sync(kGroup + group, 128);
        const int first = first_key(group), rows = room - j0 - first;
        if (kRagged && rows < 64) {
            OwnKeys::store_some(own_k, first, key_rows(p.dk, p.head_dim_qk, rows).from(0, key_col(group)));
            OwnValues::store_some(own_v, first, key_rows(p.dv, p.head_dim_v, rows).from(0, value_col(group)));
        } else if (thread_index() % 128 == 0) {
            const int row = band.first_k + j0 + first;
            OwnKeys::store_64(own_k, first, arguments.dk, row, hk, band.batch, key_col(group));
            OwnValues::store_64(own_v, first, arguments.dv, row, hk, band.batch, value_col(group));
            bulk_commit();
        }
        if (thread_index() % 128 == 0) bulk_wait<0>();  // for the sums of dQ, too
    }

    // A lane's entries of a row, which is one of its two. check: 0 * x is 0 for every finite x, NaN for all others.
    template <typename Tile, int kSize>
    static FASTATTN_DEVICE void write_row(uint32_t tile, int row, int half, const float (&d)[kSize], float scale,
                                          float& check) {
#pragma unroll
        for (int n = 0; n < kSize / 4; ++n) {
            const float x = d[4 * n + 2 * half], y = d[4 * n + 2 * half + 1];
            check = fmaf(0.f, x, fmaf(0.f, y, check));
            store_shared(Tile::address(tile, row, n) + 2 * fragment_col(), pack<T>(scale * x, scale * y));
        }
    }

    // The last rows of dK or dV that there are.
    FASTATTN_DEVICE Matrix<T> key_rows(const Tensor4& x, int64_t cols, int rows) const {
        const Matrix<T> all = key_matrix<T>(x, band, hk, cols);
        return {all.data + (room - rows) * all.row_stride, all.row_stride, all.col_stride, rows, all.cols};
    }

    // The 16 keys of a warp, for the NaN of queries that do not see them.
    FASTATTN_DEVICE void redo(int group, uint32_t own_k, uint32_t own_v) const {
        warp_barrier();
#pragma unroll 1
        for (int r = 0; r < 16; ++r) {
            const int row = first_key(group) + thread_index() % 128 / 32 * 16 + r, j = j0 + row;
            if (j >= room) break;
            RowSum<kKeyCols> dk{key_col(group)};
            RowSum<kValueCols> dv{value_col(group)};
#pragma unroll 1
            for (int h = hk * heads; h < (hk + 1) * heads; ++h) redo_key<T>(p, band, h, hk, j, dk, dv);
            dk.template write<T, kTile.keys>(own_k, row, static_cast<float>(p.softmax_scale));
            dv.template write<T, kTile.keys>(own_v, row, 1.f);
        }
    }
};

}  // namespace fastattn::cuda::sm90
