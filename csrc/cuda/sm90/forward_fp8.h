// Forward for Hopper on e4m3: the schedule of forward.h (S of one tile of keys in flight with the P V of the last),
// with products of 8-bit operands and the output in bfloat16.
//
// wgmma takes e4m3 operands with rows along K only. For S = Q K^T that is how Q and K lie; for O = P V it takes V^T,
// which a kernel before this one writes to the workspace (transpose_values). P stays in registers. What a lane holds of
// a row of S, of every 16 keys, is not what it has to hold of a row of the operand P (t = lane % 4):
//
//     keys of S       0  1| 2  3| 4  5| 6  7| 8  9|10 11|12 13|14 15     t = 0, 1, 2, 3, 0, 1, 2, 3
//     columns of P    0  1  2  3| 4  5  6  7| 8  9 10 11|12 13 14 15     t = 0,    1,    2,    3
//
// The order of keys within a sum is free: column 4 t + 2 b + e of P is given to key 8 b + 2 t + e, which the lane has,
// and column 4 t + 2 b + e of V^T to the values of that key.
//
// Weights are 2^8 exp(s - max), at most 256, so that e4m3, at most 448, has 17 binades below them before it has none;
// the factor is in the sum of weights too. Scores are multiplied with q_descale k_descale in float, the output with
// v_descale.
//
// Shah et al., "FlashAttention-3", 2024, section 3.3; its kernel permutes V in shared memory instead.
#pragma once

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/e4m3.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/opaque.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/sm90/contain.h"
#include "cuda/sm90/softmax.h"
#include "cuda/sm90/tiles.h"
#include "cuda/sm90/work.h"

namespace fastattn::cuda::sm90 {

// Columns of V^T: whole groups of 32 keys, zeros behind the last key.
FASTATTN_HOST_DEVICE int64_t padded_keys(const AttentionParams& p) { return (p.seqlen_k + 31) / 32 * 32; }

// The workspace becomes V^T, (batch, heads_k, head_dim_v, padded_keys). One thread: 32 keys of one dimension, read
// beside those of its neighbours, written as one sector of 32 bytes.
FASTATTN_DEVICE void transpose_values(const AttentionParams& p, int64_t index) {
    const int64_t groups = padded_keys(p) / 32, dim = index % p.head_dim_v, rest = index / p.head_dim_v;
    const int64_t bh = rest / groups, key0 = rest % groups * 32;
    if (bh >= p.batch * p.heads_k) return;
    const E4M3* values = static_cast<const E4M3*>(p.v.data) + bh / p.heads_k * p.v.stride[0] +
                         bh % p.heads_k * p.v.stride[1] + dim * p.v.stride[3];
    auto* row = static_cast<unsigned char*>(p.workspace) + (bh * p.head_dim_v + dim) * padded_keys(p) + key0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t words[4] = {};
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            const int64_t key = key0 + 16 * half + n / 2 % 2 * 8 + n / 4 * 2 + n % 2;
            if (key >= p.seqlen_k) continue;
            words[n / 4] |= static_cast<uint32_t>(load_global(values + key * p.v.stride[2]).bits) << n % 4 * 8;
        }
        store_global(reinterpret_cast<Words4*>(row + 16 * half), Words4{words[0], words[1], words[2], words[3]});
    }
}

// Tiles of one operand in a ring of buffers, with two barriers for each.
template <typename Tile, int kStages>
struct TileRing {
    static constexpr uint32_t kBytes = kStages * Tile::kBytes, kBarrierBytes = 16 * kStages;
    uint32_t tiles, barriers;
    RingPlace<kStages> place = {};

    FASTATTN_DEVICE uint32_t tile() const { return tiles + place.stage * Tile::kBytes; }
    FASTATTN_DEVICE uint32_t full() const { return barriers + 8 * place.stage; }
    FASTATTN_DEVICE uint32_t empty() const { return full() + 8 * kStages; }

    FASTATTN_DEVICE void initialize(int readers) const {
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(barriers + 8 * stage, 1);
            mbarrier_init(barriers + 8 * (stage + kStages), readers);
        }
    }
    FASTATTN_DEVICE void load(const TensorMap& map, int row, int head, int batch, int col) {
        mbarrier_wait(empty(), place.parity ^ 1);
        mbarrier_arrive_expect_tx(full(), Tile::kBytes);
        Tile::load(tile(), map, full(), row, head, batch, col);
        place.advance();
    }
    // Those who read it: from the tile's arrival until each warp has released it.
    FASTATTN_DEVICE void await() const { mbarrier_wait(full(), place.parity); }
    FASTATTN_DEVICE void release() {
        if (lane_index() == 0) mbarrier_arrive(empty());
        place.advance();
    }
};

struct ForwardFp8Arguments {
    TensorMap q, k, v, out;  // q, k and v^T in pairs of e4m3; q and out in boxes of 64 rows, the others of a tile's
    AttentionParams params;
};

template <int kHeadDim, int kVariant>
struct ForwardFp8 {
    static constexpr ForwardTile kTile = e4m3_tile(kHeadDim, kVariant).tile;
    static constexpr bool kCollect = e4m3_tile(kHeadDim, kVariant).collect;
    static constexpr int kKeys = kTile.keys, kGroups = kTile.consumers(), kExponent = 8;
    static constexpr int kPart = kHeadDim < 128 ? kHeadDim : 128;  // columns of O that are collected at a time
    static constexpr bool kInParts = kCollect && kPart < kHeadDim;
    static constexpr int kRegisters[] = {kTile.producer_registers(), kTile.consumer_registers()};
    // Of pairs of elements, whose bytes lie like 16-bit ones; Q and the output of 64 queries, a warpgroup's.
    using Queries = Operand<64, kHeadDim / 2>;
    using Keys = Operand<kKeys, kHeadDim / 2>;
    using Values = Operand<kHeadDim, kKeys / 2>;
    using Outputs = Operand<64, kHeadDim>;
    using KeyRing = TileRing<Keys, kTile.stages>;
    using ValueRing = TileRing<Values, kTile.stages>;
    using TileWork = Work<kTile.queries, kKeys, kTile.persistent, false>;
    using Softmax = ScaledRowSoftmax<kExponent>;
    static constexpr int kTurn = 1, kGroup = 4;  // named barriers: the turn of a warpgroup, one for its warps

    const ForwardFp8Arguments& arguments;
    const AttentionParams& p = arguments.params;
    const Band band = Band::of<false>(p, 0);  // of every batch entry: none has a length of its own
    const uint32_t rows = smem_base(), k = rows + kGroups * Outputs::kBytes, v = k + KeyRing::kBytes;
    const uint32_t q_full = v + ValueRing::kBytes, q_empty = q_full + 8, k_barriers = q_empty + 8;

    FASTATTN_DEVICE explicit ForwardFp8(const ForwardFp8Arguments& arguments) : arguments(arguments) {}

    FASTATTN_DEVICE KeyRing key_ring() const { return {k, k_barriers}; }
    FASTATTN_DEVICE ValueRing value_ring() const { return {v, k_barriers + KeyRing::kBarrierBytes}; }
    // Q of a warpgroup, and then its output.
    FASTATTN_DEVICE uint32_t rows_of(int group) const { return rows + group * Outputs::kBytes; }

    FASTATTN_DEVICE void initialize() const {
        mbarrier_init(q_full, 1);
        mbarrier_init(q_empty, kGroups);
        key_ring().initialize(4 * kGroups);  // one arrival per warp
        value_ring().initialize(4 * kGroups);
        fence_mbarrier_init();
    }

    // One thread: all loads, in the order in which they are used.
    FASTATTN_DEVICE void produce() const {
        KeyRing keys = key_ring();
        ValueRing values = value_ring();
        TileWork work(band);
        for (int turn = 0; work.get(p, turn); ++turn) {
            const int count = work.tiles.count();
            if (turn > 0) mbarrier_wait(q_empty, (turn - 1) & 1);
            if (count == 0) {  // all the same: nobody is to be more than a turn ahead
                mbarrier_arrive(q_full);
                continue;
            }
            mbarrier_arrive_expect_tx(q_full, kGroups * Queries::kBytes);
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                Queries::load(rows_of(group), arguments.q, q_full, work.i0 + 64 * group, work.h, work.band.batch);
            }
            const auto load_values = [&](int n) {
                values.load(arguments.v, 0, work.hk, work.band.batch, work.tiles.at(n) * (kKeys / 2));
            };
            for (int n = 0; n < count; ++n) {
                keys.load(arguments.k, work.tiles.at(n) * kKeys, work.hk, work.band.batch, 0);
                if (n > 0) load_values(n - 1);
            }
            load_values(count - 1);
        }
    }

    FASTATTN_DEVICE void consume() const {
        const int group = thread_index() / 128 - 1;
        KeyRing keys = key_ring();
        ValueRing values = value_ring();
        TileWork work(band);
        if (group == kGroups - 1) pass_turn(group);  // the first has the first turn
        for (int turn = 0; work.get(p, turn); ++turn) {
            Softmax softmax(unit_of(work));
            Sum out;
            mbarrier_wait(q_full, turn & 1);
            if (work.tiles.count() > 0) attend(work, group, softmax, out, keys, values);
            finish(work, group, softmax, out.sum);
        }
        if (group == 0) wait_turn(group);  // no barrier is left half full
    }

private:
    // O of a lane. Products are added to `sum` by the tensor cores, or come in `part`, kPart columns at a time, and are
    // added here.
    struct Sum {
        static constexpr int kCount = kCollect ? kPart / 2 : 1;
        float sum[kHeadDim / 2] = {};
        float part[kCount];
        float behind[2] = {};  // what brings sum to the maximum that part was computed with

        // Starts the product with the weights of one tile, of all columns or those of one part.
        FASTATTN_DEVICE void multiply(const uint32_t (&weights)[kKeys / 32][4], uint32_t tile, int n = 0) {
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kKeys / 32; ++step) {
                const uint64_t values = Values::k_major(tile, n * kPart, step);
                if constexpr (kCollect) {
                    wgmma_rs<E4M3, kPart>(part, weights[step], values, step > 0);
                } else {
                    wgmma_rs<E4M3, kHeadDim>(sum, weights[step], values, true);
                }
            }
            wgmma_commit();
        }
        FASTATTN_DEVICE void wait() {
            if constexpr (kCollect) {
                wgmma_wait<0>(part);
            } else {
                wgmma_wait<0>(sum);
            }
        }
        FASTATTN_DEVICE void add_part(int n) {
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
                float& x = sum[n * kCount + e];
                x = fmaf(x, behind[e / 2 & 1], part[e]);
            }
        }
        // The product has arrived, and the next is of a tile that shrinks all before it.
        FASTATTN_DEVICE void collect(const float (&shrink)[2]) {
            if constexpr (kCollect) {
                add_part(0);
                behind[0] = shrink[0], behind[1] = shrink[1];
            } else {
#pragma unroll
                for (int e = 0; e < kHeadDim / 2; ++e) sum[e] *= shrink[e / 2 & 1];
            }
        }
    };

    FASTATTN_DEVICE static float descale(const Table<float>& scales, const TileWork& work) {
        return scales.data ? look_up(scales, work.band.batch, work.hk) : 1.f;
    }
    // Not 0, which times the difference to a maximum of -inf would be NaN.
    FASTATTN_DEVICE float unit_of(const TileWork& work) const {
        constexpr float kSmallest = 1.1754944e-38f;
        const float scale = static_cast<float>(p.softmax_scale) * kLog2E;
        const float unit = scale * descale(p.q_descale, work) * descale(p.k_descale, work);
        return unit < kSmallest ? kSmallest : unit;
    }

    static FASTATTN_DEVICE void wait_turn(int group) {
        if (kTile.ping_pong) named_barrier_sync(kTurn + group, 256);
    }
    static FASTATTN_DEVICE void pass_turn(int group) {
        if (kTile.ping_pong) named_barrier_arrive(kTurn + (opaque(group) + 1) % kGroups, 256);
    }

    // Starts S = Q K^T.
    FASTATTN_DEVICE void multiply_keys(float (&s)[kKeys / 2], int group, uint32_t tile) const {
        const uint32_t queries = opaque(rows_of(group));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 32; ++step) {
            wgmma_ss<E4M3, kKeys>(s, Queries::k_major(queries, 0, step), Keys::k_major(tile, 0, step), step > 0);
        }
        wgmma_commit();
    }

    // Scores of keys that a query does not see become -inf; i0: the warpgroup's first query.
    FASTATTN_DEVICE void hide(float (&s)[kKeys / 2], int i0, int j0) const {
        const int j = j0 + fragment_col();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + fragment_row() + 8 * half, begin = band.keys_begin(i) - j, end = band.keys_end(i) - j;
#pragma unroll
            for (int n = 0; n < kKeys / 4; ++n) {
                const int col = n / 2 * 8 + n % 2;
                if (col < begin || col >= end) s[n / 2 * 4 + 2 * half + n % 2] = -INFINITY;
            }
        }
    }

    // The operand P, its columns in the order above.
    static FASTATTN_DEVICE void pack_weights(uint32_t (&weights)[kKeys / 32][4], const float (&s)[kKeys / 2]) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
            const int first = n / 4 * 16 + n % 4 / 2 * 8 + n % 2 * 2;  // of 8 columns; those of the next 8 follow
            weights[n / 4][n % 4] = pack_e4m3(s[first], s[first + 1], s[first + 4], s[first + 5]);
        }
    }

    // S of tile n, then its weights, beside no other product of this warpgroup's.
    FASTATTN_DEVICE void weigh_alone(float (&s)[kKeys / 2], const TileWork& work, int n, int group, Softmax& softmax,
                                     Sum& out, KeyRing& keys) const {
        keys.await();
        wait_turn(group);
        multiply_keys(s, group, keys.tile());
        pass_turn(group);
        wgmma_wait<0>(s);
        keys.release();
        if (n < work.tiles.masked()) hide(s, work.i0 + 64 * group, work.tiles.at(n) * kKeys);
        softmax.template weigh<true>(s, out.behind);
    }

    FASTATTN_DEVICE void attend(const TileWork& work, int group, Softmax& softmax, Sum& out, KeyRing& keys,
                                ValueRing& values) const {
        const int i0 = work.i0 + 64 * group, count = work.tiles.count(), masked = work.tiles.masked();
        if constexpr (kInParts) return attend_in_parts(work, group, softmax, out, keys, values);
        uint32_t weights[kKeys / 32][4];
        float shrink[2] = {1.f, 1.f};
        {
            float s[kKeys / 2];
            weigh_alone(s, work, 0, group, softmax, out, keys);
            if (count > 1) keys.await();
            pack_weights(weights, s);
        }
        int n = 1;
        for (; n < masked; ++n) {
            next<true>(i0, work.tiles.at(n) * kKeys, n + 1 < count, group, softmax, out, weights, keys, values);
        }
        for (; n < count; ++n) next<false>(i0, 0, n + 1 < count, group, softmax, out, weights, keys, values);
        values.await();
        out.multiply(weights, values.tile());
        out.wait();
        values.release();
        out.collect(shrink);
    }

    // Where O and a part of a product leave no room for another tile's S: a tile after the other. Tensor cores are kept
    // busy by another warpgroup while this one computes weights.
    FASTATTN_DEVICE void attend_in_parts(const TileWork& work, int group, Softmax& softmax, Sum& out, KeyRing& keys,
                                         ValueRing& values) const {
#pragma unroll 1
        for (int n = 0; n < work.tiles.count(); ++n) {
            uint32_t weights[kKeys / 32][4];
            {
                float s[kKeys / 2];
                weigh_alone(s, work, n, group, softmax, out, keys);
                pack_weights(weights, s);
            }
            values.await();
#pragma unroll
            for (int part = 0; part < kHeadDim / kPart; ++part) {
                out.multiply(weights, values.tile(), part);
                out.wait();
                out.add_part(part);
            }
            values.release();
        }
    }

    // S of a tile, which has arrived, beside P V of the one before, whose weights become this one's.
    template <bool kMasked>
    FASTATTN_DEVICE void next(int i0, int j0, bool more, int group, Softmax& softmax, Sum& out,
                              uint32_t (&weights)[kKeys / 32][4], KeyRing& keys, ValueRing& values) const {
        float s[kKeys / 2], shrink[2];
        wait_turn(group);
        multiply_keys(s, group, keys.tile());
        values.await();
        out.multiply(weights, values.tile());
        pass_turn(group);
        wgmma_wait<1>(s);
        keys.release();
        if (kMasked) hide(s, i0, j0);
        softmax.template weigh<kMasked>(s, shrink);
        pin_registers(s);
        // HAZARD: with no branch before the next wait, the compiler moves the exponentials behind it.
        if (more) keys.await();
        out.wait();
        values.release();
        out.collect(shrink);
        pack_weights(weights, s);
    }

    // Normalises the output and writes it, through the place of the warpgroup's Q, which nothing reads any more.
    FASTATTN_DEVICE void finish(const TileWork& work, int group, Softmax& softmax,
                                const float (&out)[kHeadDim / 2]) const {
        const int i0 = work.i0 + 64 * group;
        const float v_descale = descale(p.v_descale, work);
        const uint32_t tile = rows_of(group);
        softmax.finish();
        named_barrier_sync(kGroup + group, 128);  // all four warps are done with Q
        bool broken = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = fragment_row() + 8 * half, i = i0 + row;
            const float factor = softmax.normalizer(half) * v_descale;
            float check = 0.f;  // 0 * x is 0 for every finite x, NaN for all others
#pragma unroll
            for (int n = 2 * half; n < kHeadDim / 2; n += 4) {
                check = fmaf(0.f, out[n], fmaf(0.f, out[n + 1], check));
                store_shared(Outputs::address(tile, row, n / 4) + 2 * fragment_col(),
                             pack<BFloat16>(out[n] * factor, out[n + 1] * factor));
            }
            if (i >= band.seqlen_q) continue;
            broken = broken || check != 0.f;
            if (lane_index() % 4 == 0) store_global(work.band.row_of(p.lse, work.h, i), softmax.lse(half));
        }
        if (work.tiles.masked() > 0 && any_lane(broken)) redo(work, i0, tile, softmax, v_descale);
        fence_proxy_async();
        named_barrier_sync(kGroup + group, 128);
        if (thread_index() % 128 == 0) {
            Outputs::store_64(tile, 0, arguments.out, i0, work.h, work.band.batch);
            bulk_commit();
            bulk_wait_read<0>();
            mbarrier_arrive(q_empty);
        }
    }
    // The 16 rows of a warp, for the NaN of keys that they do not see; V as the caller gave it.
    FASTATTN_DEVICE void redo(const TileWork& work, int i0, uint32_t tile, const Softmax& softmax,
                              float v_descale) const {
        warp_barrier();
        const int first = thread_index() % 128 / 32 * 16;
        const float factor[] = {softmax.normalizer(0) * (1 << kExponent) * v_descale,
                                softmax.normalizer(1) * (1 << kExponent) * v_descale};
#pragma unroll 1
        for (int r = 0; r < min32(16, band.seqlen_q - i0 - first); ++r) {
            const int lane = r % 8 * 4;
            const float max = shuffle(r < 8 ? softmax.max[0] : softmax.max[1], lane);
            const float normalizer = shuffle(r < 8 ? factor[0] : factor[1], lane);
            RowSum<kHeadDim> out;
            redo_keys<E4M3>(p, work.band, work.h, i0 + first + r, 0, band.seqlen_k, softmax.unit, max, normalizer, out,
                            [&](const Tensor4& x, int j) { return key_row<E4M3>(x, work.band, work.hk, j); });
            out.template write<BFloat16, 64>(tile, first + r, 1.f);
        }
    }
};

}  // namespace fastattn::cuda::sm90
