// Forward for Hopper: one warpgroup copies tiles by TMA, two or three multiply them with wgmma.
//
// In a computing warpgroup, with tiles of keys numbered in the order in which they are visited:
//
//     tensor cores   S1 = Q K1^T, O += P0 V0 | S2 = Q K2^T, O += P1 V1 | ...
//     other units            softmax of S1   |         softmax of S2   | ...
//
// S n+1 and P n V n are in flight together; the softmax of n+1 starts when S n+1 is there and runs beside P n V n.
// Where tile.ping_pong, warpgroups hand each other the turn to issue products, so that one's softmax runs beside
// another's.
//
// Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", 2024.
#pragma once

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/sm90/contain.h"
#include "cuda/sm90/softmax.h"
#include "cuda/sm90/tiles.h"
#include "cuda/sm90/work.h"

namespace fastattn::cuda::sm90 {

struct ForwardArguments {
    TensorMap q, k, v, out;  // boxes: one span of all rows of a tile; of 64 rows for out
    AttentionParams params;
};

template <typename T, int kHeadDim, int kVariant, bool kRagged>
struct Forward {
    static constexpr ForwardTile kTile = forward_tile(kHeadDim, kVariant, kRagged);
    static constexpr int kStages = kTile.stages, kConsumers = kTile.consumers();
    static constexpr int kHeadDimV = value_dim(kHeadDim), kThreads = kTile.threads();
    static constexpr int kProducerRegisters = kTile.producer_registers();
    static constexpr int kConsumerRegisters = kTile.consumer_registers();
    using Queries = Operand<kTile.queries, kHeadDim>;
    using Keys = Operand<kTile.keys, kHeadDim>;
    using Values = Operand<kTile.keys, kHeadDimV>;
    using Outputs = Operand<kTile.queries, kHeadDimV>;  // in the place of Queries
    using TileWork = Work<kTile.queries, kTile.keys, kTile.persistent, kRagged>;
    static_assert(Outputs::kSpan == Queries::kSpan && Outputs::kBytes <= Queries::kBytes);

    // Named barriers: the turn of each consumer, one for the warps of each, and one for all of them.
    static constexpr int kTurn = 1, kGroup = 4, kAll = 7;

    const ForwardArguments& arguments;
    const AttentionParams& p = arguments.params;
    const Band first_band = kRagged ? Band() : Band::of<false>(p, 0);  // the same for all but for `batch`
    const uint32_t q = smem_base(), k = q + Queries::kBytes, v = k + kStages * Keys::kBytes;
    const uint32_t barriers = v + kStages * Values::kBytes;

    FASTATTN_DEVICE explicit Forward(const ForwardArguments& arguments) : arguments(arguments) {}

    FASTATTN_DEVICE uint32_t q_full() const { return barriers; }
    FASTATTN_DEVICE uint32_t q_empty() const { return barriers + 8; }
    FASTATTN_DEVICE uint32_t k_full(int stage) const { return barriers + 16 + 8 * stage; }
    FASTATTN_DEVICE uint32_t k_empty(int stage) const { return k_full(stage) + 8 * kStages; }
    FASTATTN_DEVICE uint32_t v_full(int stage) const { return k_full(stage) + 16 * kStages; }
    FASTATTN_DEVICE uint32_t v_empty(int stage) const { return k_full(stage) + 24 * kStages; }

    FASTATTN_DEVICE void initialize() const {
        mbarrier_init(q_full(), 1);
        mbarrier_init(q_empty(), kConsumers);
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(k_empty(stage), 4 * kConsumers);  // one arrival per warp
            mbarrier_init(v_empty(stage), 4 * kConsumers);
        }
        fence_mbarrier_init();
    }

    // One thread: all loads. K of tile n + 1 comes before V of tile n, the order in which they are used.
    FASTATTN_DEVICE void produce() const {
        RingPlace<kStages> k_place, v_place;
        TileWork work(first_band);
        for (int turn = 0; work.get(p, turn); ++turn) {
            const int count = work.tiles.count();
            if (turn > 0) mbarrier_wait(q_empty(), (turn - 1) & 1);
            if (count == 0) {  // or those who compute would be more than a turn ahead, and q_empty's parity ambiguous
                mbarrier_arrive(q_full());
                continue;
            }
            mbarrier_arrive_expect_tx(q_full(), Queries::kBytes);
            Queries::load(q, arguments.q, q_full(), work.band.first_q + work.i0, work.h, work.band.batch);
            for (int n = 0; n <= count; ++n) {
                if (n < count) {
                    load_next<Keys>(k, arguments.k, k_full(k_place.stage), k_empty(k_place.stage), k_place, work, n);
                }
                if (n > 0) {
                    load_next<Values>(v, arguments.v, v_full(v_place.stage), v_empty(v_place.stage), v_place, work,
                                      n - 1);
                }
            }
        }
    }

    FASTATTN_DEVICE void consume() const {
        const int group = thread_index() / 128 - 1;
        RingPlace<kStages> k_place, v_place;
        TileWork work(first_band);
        if (kTile.ping_pong && group == kConsumers - 1) pass_turn(group);  // the first has the first turn
        int turn = 0;
        for (; work.get(p, turn); ++turn) {
            RowSoftmax softmax(static_cast<float>(p.softmax_scale) * kLog2E);
            float out[kHeadDimV / 2];
#pragma unroll
            for (float& x : out) x = 0.f;
            mbarrier_wait(q_full(), turn & 1);
            if (work.tiles.count() > 0) attend(work, group, softmax, out, k_place, v_place);
            finish(work, group, softmax, out);
        }
        if (kTile.ping_pong && group == 0) wait_turn(group);  // no barrier is left half full
    }

private:
    template <typename Tile>
    FASTATTN_DEVICE static void load_next(uint32_t ring, const TensorMap& map, uint32_t full, uint32_t empty,
                                          RingPlace<kStages>& place, const TileWork& work, int n) {
        mbarrier_wait(empty, place.parity ^ 1);
        mbarrier_arrive_expect_tx(full, Tile::kBytes);
        Tile::load(ring + place.stage * Tile::kBytes, map, full, work.band.first_k + work.tiles.at(n) * kTile.keys,
                   work.hk, work.band.batch);
        place.advance();
    }

    static FASTATTN_DEVICE void wait_turn(int group) {
        if (kTile.ping_pong) named_barrier_sync(kTurn + group, 256);
    }
    static FASTATTN_DEVICE void pass_turn(int group) {
        if (kTile.ping_pong) named_barrier_arrive(kTurn + (group + 1 == kConsumers ? 0 : group + 1), 256);
    }
    static FASTATTN_DEVICE void release(uint32_t empty) {
        if (lane_index() == 0) mbarrier_arrive(empty);
    }

    // Values behind the sequence's last key are anything, and 0 * inf is NaN: they become 0. All who compute wait for
    // each other here, so none may have the turn.
    FASTATTN_DEVICE void clear_values(const TileWork& work, int n, const RingPlace<kStages>& place) const {
        const int keys = work.band.seqlen_k - work.tiles.at(n) * kTile.keys;
        if (!kRagged || keys >= kTile.keys) return;
        mbarrier_wait(v_full(place.stage), place.parity);
        Values::clear_rows(v + place.stage * Values::kBytes, keys, thread_index() - 128, 128 * kConsumers);
        fence_proxy_async();
        named_barrier_sync(kAll, 128 * kConsumers);
    }

    // Starts S = Q K^T.
    FASTATTN_DEVICE void multiply_keys(float (&s)[kTile.keys / 2], int group, int stage) const {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
            wgmma_ss<T, kTile.keys>(s, Queries::k_major(q, 64 * group, step),
                                    Keys::k_major(k + stage * Keys::kBytes, 0, step), step > 0);
        }
        wgmma_commit();
    }
    // Starts O += P V.
    FASTATTN_DEVICE void multiply_values(float (&out)[kHeadDimV / 2], const uint32_t (&weights)[kTile.keys / 16][4],
                                         int stage) const {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTile.keys / 16; ++step) {
            wgmma_rs<T, kHeadDimV, true>(out, weights[step], Values::mn_major(v + stage * Values::kBytes, 0, step),
                                         true);
        }
        wgmma_commit();
    }

    // Scores of keys outside the band become -inf.
    static FASTATTN_DEVICE void apply_band(float (&s)[kTile.keys / 2], const Band& band, int i0, int j0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + fragment_row() + 8 * half;
            const int begin = band.keys_begin(i) - j0 - fragment_col(), end = band.keys_end(i) - j0 - fragment_col();
#pragma unroll
            for (int n = 0; n < kTile.keys / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (8 * n + e < begin || 8 * n + e >= end) s[4 * n + 2 * half + e] = -INFINITY;
                }
            }
        }
    }

    FASTATTN_DEVICE void attend(const TileWork& work, int group, RowSoftmax& softmax, float (&out)[kHeadDimV / 2],
                                RingPlace<kStages>& k_place, RingPlace<kStages>& v_place) const {
        const int i0 = work.i0 + 64 * group, count = work.tiles.count(), masked = work.tiles.masked();
        uint32_t weights[kTile.keys / 16][4];
        float shrink[2];
        {
            float s[kTile.keys / 2];
            mbarrier_wait(k_full(k_place.stage), k_place.parity);
            wait_turn(group);
            multiply_keys(s, group, k_place.stage);
            pass_turn(group);
            wgmma_wait<0>(s);
            release(k_empty(k_place.stage));
            k_place.advance();
            if (masked > 0) apply_band(s, work.band, i0, work.tiles.at(0) * kTile.keys);
            softmax.weigh<true>(s, shrink);
            if (count > 1) mbarrier_wait(k_full(k_place.stage), k_place.parity);
            pack_weights(weights, s);
        }
        int n = 1;
        for (; n < masked; ++n) step<true>(work, group, i0, n, softmax, out, weights, k_place, v_place);
        for (; n < count; ++n) step<false>(work, group, i0, n, softmax, out, weights, k_place, v_place);
        clear_values(work, count - 1, v_place);
        mbarrier_wait(v_full(v_place.stage), v_place.parity);
        multiply_values(out, weights, v_place.stage);
        wgmma_wait<0>(out);
        release(v_empty(v_place.stage));
        v_place.advance();
    }

    // S of tile n and O += P V of tile n - 1, whose weights become those of tile n.
    template <bool kMasked>
    FASTATTN_DEVICE void step(const TileWork& work, int group, int i0, int n, RowSoftmax& softmax,
                              float (&out)[kHeadDimV / 2], uint32_t (&weights)[kTile.keys / 16][4],
                              RingPlace<kStages>& k_place, RingPlace<kStages>& v_place) const {
        float s[kTile.keys / 2], shrink[2];
        clear_values(work, n - 1, v_place);
        wait_turn(group);
        multiply_keys(s, group, k_place.stage);
        mbarrier_wait(v_full(v_place.stage), v_place.parity);
        multiply_values(out, weights, v_place.stage);
        pass_turn(group);
        wgmma_wait<1>(s);
        release(k_empty(k_place.stage));
        k_place.advance();
        if (kMasked) apply_band(s, work.band, i0, work.tiles.at(n) * kTile.keys);
        softmax.weigh<kMasked>(s, shrink);
        pin_registers(s);
        // HAZARD: with no branch before the next wait, the compiler moves the exponentials behind it.
        if (n + 1 < work.tiles.count()) mbarrier_wait(k_full(k_place.stage), k_place.parity);
        wgmma_wait<0>(out);
        release(v_empty(v_place.stage));
        v_place.advance();
#pragma unroll
        for (int e = 0; e < kHeadDimV / 2; ++e) out[e] *= shrink[e / 2 & 1];
        pack_weights(weights, s);
    }

    static FASTATTN_DEVICE void pack_weights(uint32_t (&weights)[kTile.keys / 16][4],
                                             const float (&s)[kTile.keys / 2]) {
#pragma unroll
        for (int step = 0; step < kTile.keys / 16; ++step) pack_operand<T>(weights[step], s, step);
    }

    // Normalises the output and writes it, through the warpgroup's rows of the tile of Q, which nothing reads any more.
    FASTATTN_DEVICE void finish(const TileWork& work, int group, RowSoftmax& softmax,
                                const float (&out)[kHeadDimV / 2]) const {
        softmax.finish();
        named_barrier_sync(kGroup + group, 128);  // all four warps are done with Q
        bool broken = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 64 * group + fragment_row() + 8 * half, i = work.i0 + row;
            const float factor = softmax.normalizer(half);
            float check = 0.f;  // 0 * x is 0 for every finite x, NaN for all others
#pragma unroll
            for (int n = 0; n < kHeadDimV / 8; ++n) {
                const float x = out[4 * n + 2 * half], y = out[4 * n + 2 * half + 1];
                check = fmaf(0.f, x, fmaf(0.f, y, check));
                store_shared(Outputs::address(q, row, n) + 2 * fragment_col(), pack<T>(x * factor, y * factor));
            }
            if (i >= work.band.seqlen_q) continue;
            broken = broken || check != 0.f;
            if (lane_index() % 4 == 0) store_global(work.band.row_of(p.lse, work.h, i), softmax.lse(half));
        }
        if (work.tiles.masked() > 0 && any_lane(broken)) redo(work, group, softmax);
        fence_proxy_async();
        named_barrier_sync(kGroup + group, 128);
        const int i0 = work.i0 + 64 * group;
        if (kRagged && i0 + 64 > work.band.seqlen_q) {
            Outputs::store_some(q, 64 * group, query_matrix<T>(p.out, work.band, work.h, p.head_dim_v).from(i0, 0));
        } else if (thread_index() % 128 == 0) {
            Outputs::store_64(q, 64 * group, arguments.out, work.band.first_q + i0, work.h, work.band.batch);
            bulk_commit();
            bulk_wait_read<0>();
            mbarrier_arrive(q_empty());
        }
    }

    // The 16 rows of a warp, for the NaN of keys that they do not see.
    FASTATTN_DEVICE void redo(const TileWork& work, int group, const RowSoftmax& softmax) const {
        const Band& band = work.band;
        warp_barrier();
#pragma unroll 1
        for (int r = 0; r < 16; ++r) {
            const int row = 64 * group + thread_index() % 128 / 32 * 16 + r;
            const float max = shuffle(r < 8 ? softmax.max[0] : softmax.max[1], r % 8 * 4);
            const float normalizer = shuffle(r < 8 ? softmax.normalizer(0) : softmax.normalizer(1), r % 8 * 4);
            if (work.i0 + row >= band.seqlen_q) break;
            RowSum<kHeadDimV> out;
            redo_keys<T>(p, band, work.h, work.i0 + row, 0, band.seqlen_k, softmax.unit, max, normalizer, out,
                         [&](const Tensor4& x, int j) { return key_row<T>(x, band, work.hk, j); });
            out.template write<T, kTile.queries>(q, row, 1.f);
        }
    }
};

}  // namespace fastattn::cuda::sm90
