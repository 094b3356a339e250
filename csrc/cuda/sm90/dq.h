// dQ in one order of summation, for Hopper: one warpgroup copies tiles by TMA, two multiply them with wgmma.
//
// A block owns dQ of 128 queries, a computing warpgroup that of 64, and runs over the keys that they see:
//
//     S = Q K^T;  dP = dO V^T;  dS = exp(S - lse) * (dP - delta);  dQ += dS K
//
// dS leaves the registers of one product as the operand A of the next. The warpgroups do not wait for each other: the
// exponentials of one run beside the products of the other.
#pragma once

#include "cuda/band.h"
#include "cuda/ptx/arithmetic.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/shared.h"
#include "cuda/sm90/contain.h"
#include "cuda/sm90/operand.h"
#include "cuda/sm90/tiles.h"
#include "cuda/sm90/work.h"

namespace fastattn::cuda::sm90 {

struct QueryGradientArguments {
    TensorMap q, k, v, grad_out, dq;  // boxes: one span of all rows of a tile; of 64 rows for dq
    AttentionParams params;
};

template <typename T, int kHeadDim, bool kRagged>
struct QueryGradient {
    static constexpr QueryTile kTile = query_tile(kHeadDim);
    static constexpr int kThreads = 384, kStages = 2, kSharedBytes = kTile.shared_bytes(kHeadDim);
    static constexpr int kCount = kTile.keys / 2;  // accumulators of S
    using Queries = Operand<kTile.queries, kHeadDim>;
    using Grads = Operand<kTile.queries, value_dim(kHeadDim)>;  // dO
    using Keys = Operand<kTile.keys, kHeadDim>;
    using Values = Operand<kTile.keys, value_dim(kHeadDim)>;
    using TileWork = Work<kTile.queries, kTile.keys, false, kRagged>;
    static_assert(kTile.queries == 128 && kSharedBytes <= 227 * 1024);

    static constexpr int kGroup = 1, kAll = 3;  // named barriers: one for each warpgroup, one for both

    const QueryGradientArguments& arguments;
    const AttentionParams& p = arguments.params;
    const uint32_t q = smem_base(), grad_out = q + Queries::kBytes, k = grad_out + Grads::kBytes;
    const uint32_t v = k + kStages * Keys::kBytes, barriers = v + kTile.value_stages * Values::kBytes;
    TileWork work;
    const bool exists;

    FASTATTN_DEVICE explicit QueryGradient(const QueryGradientArguments& arguments)
        : arguments(arguments), work(kRagged ? Band() : Band::of<false>(p, 0)), exists(work.get(p, 0)) {}

    FASTATTN_DEVICE uint32_t q_full() const { return barriers; }
    FASTATTN_DEVICE uint32_t k_full(int stage) const { return barriers + 8 + 8 * stage; }
    FASTATTN_DEVICE uint32_t k_empty(int stage) const { return k_full(stage) + 8 * kStages; }
    FASTATTN_DEVICE uint32_t v_full(int stage) const { return k_full(stage) + 16 * kStages; }
    FASTATTN_DEVICE uint32_t v_empty(int stage) const { return v_full(stage) + 8 * kTile.value_stages; }

    FASTATTN_DEVICE void initialize() const {
        mbarrier_init(q_full(), 1);
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(k_empty(stage), 8);  // one arrival per warp
        }
#pragma unroll
        for (int stage = 0; stage < kTile.value_stages; ++stage) {
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(v_empty(stage), 8);
        }
        fence_mbarrier_init();
    }

    // One thread: all loads.
    FASTATTN_DEVICE void produce() const {
        const Band& band = work.band;
        if (work.tiles.count() == 0) return;
        mbarrier_arrive_expect_tx(q_full(), Queries::kBytes + Grads::kBytes);
        Queries::load(q, arguments.q, q_full(), band.first_q + work.i0, work.h, band.batch);
        Grads::load(grad_out, arguments.grad_out, q_full(), band.first_q + work.i0, work.h, band.batch);
        RingPlace<kStages> k_place;
        RingPlace<kTile.value_stages> v_place;
        for (int n = 0; n < work.tiles.count(); ++n, k_place.advance(), v_place.advance()) {
            const int row = band.first_k + work.tiles.at(n) * kTile.keys, k_stage = k_place.stage;
            mbarrier_wait(k_empty(k_stage), k_place.parity ^ 1);
            mbarrier_arrive_expect_tx(k_full(k_stage), Keys::kBytes);
            Keys::load(k + k_stage * Keys::kBytes, arguments.k, k_full(k_stage), row, work.hk, band.batch);
            const int v_stage = v_place.stage;
            mbarrier_wait(v_empty(v_stage), v_place.parity ^ 1);
            mbarrier_arrive_expect_tx(v_full(v_stage), Values::kBytes);
            Values::load(v + v_stage * Values::kBytes, arguments.v, v_full(v_stage), row, work.hk, band.batch);
        }
    }

    FASTATTN_DEVICE void consume() const {
        const int group = thread_index() / 128 - 1, i0 = work.i0 + 64 * group;
        float lse[2], delta[2];  // of a lane's rows; those that do not exist have P = 0
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + fragment_row() + 8 * half;
            const bool present = i < work.band.seqlen_q;
            const int64_t row = work.band.row_index(p, work.h, i);
            lse[half] = (present ? load_global(lse_rows(p) + row) : INFINITY) * kLog2E;
            delta[half] = present ? load_global(delta_rows(p) + row) : 0.f;
        }
        float dq[kHeadDim / 2];
#pragma unroll
        for (float& x : dq) x = 0.f;
        if (work.tiles.count() > 0) {
            RingPlace<kStages> k_place;
            RingPlace<kTile.value_stages> v_place;
            mbarrier_wait(q_full(), 0);
            int n = 0;
            for (; n < work.tiles.masked(); ++n) step<true>(group, i0, n, lse, delta, dq, k_place, v_place);
            for (; n < work.tiles.count(); ++n) step<false>(group, i0, n, lse, delta, dq, k_place, v_place);
        }
        finish(group, i0, dq);
    }

private:
    // Starts d = the warpgroup's rows of a, times the transpose of b.
    template <typename A, typename B>
    static FASTATTN_DEVICE void multiply_rows(float (&d)[kCount], uint32_t a, uint32_t b, int group) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < A::kSpans * A::kSpan / 16; ++step) {
            wgmma_ss<T, kTile.keys>(d, A::k_major(a, 64 * group, step), B::k_major(b, 0, step), step > 0);
        }
        wgmma_commit();
    }

    // Keys behind the sequence's last are anything, and 0 * inf is NaN: they become 0.
    FASTATTN_DEVICE void clear_keys(uint32_t tile, int first) const {
        Keys::clear_rows(tile, first, thread_index() - 128, 256);
        fence_proxy_async();
        named_barrier_sync(kAll, 256);
    }

    template <bool kMasked>
    FASTATTN_DEVICE void step(int group, int i0, int n, const float (&lse)[2], const float (&delta)[2],
                              float (&dq)[kHeadDim / 2], RingPlace<kStages>& k_place,
                              RingPlace<kTile.value_stages>& v_place) const {
        const Band& band = work.band;
        const int j0 = work.tiles.at(n) * kTile.keys;
        const uint32_t keys = k + k_place.stage * Keys::kBytes, values = v + v_place.stage * Values::kBytes;
        const float unit = static_cast<float>(p.softmax_scale) * kLog2E;
        float s[kCount], dp[kCount];
        uint32_t ds[kTile.keys / 16][4];

        mbarrier_wait(k_full(k_place.stage), k_place.parity);
        if (kRagged && kMasked && j0 + kTile.keys > band.seqlen_k) clear_keys(keys, band.seqlen_k - j0);
        multiply_rows<Queries, Keys>(s, q, keys, group);
        mbarrier_wait(v_full(v_place.stage), v_place.parity);
        multiply_rows<Grads, Values>(dp, grad_out, values, group);

        wgmma_wait<1>(s);
#pragma unroll
        for (int e = 0; e < kCount; ++e) s[e] = exp2_approx(fmaf(s[e], unit, -lse[e / 2 & 1]));
        wgmma_wait<0>(dp);
        if (lane_index() == 0) mbarrier_arrive(v_empty(v_place.stage));
        v_place.advance();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + fragment_row() + 8 * half;
            const int begin = band.keys_begin(i) - j0 - fragment_col(), end = band.keys_end(i) - j0 - fragment_col();
#pragma unroll
            for (int c = 0; c < kTile.keys / 8; ++c) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = s[4 * c + 2 * half + e];
                    x *= dp[4 * c + 2 * half + e] - delta[half];
                    if (kMasked && (8 * c + e < begin || 8 * c + e >= end)) x = 0.f;
                }
            }
        }
#pragma unroll
        for (int step = 0; step < kTile.keys / 16; ++step) pack_operand<T>(ds[step], s, step);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTile.keys / 16; ++step) {
            wgmma_rs<T, kHeadDim, true>(dq, ds[step], Keys::mn_major(keys, 0, step), true);
        }
        wgmma_commit();
        wgmma_wait<0>(dq);
        if (lane_index() == 0) mbarrier_arrive(k_empty(k_place.stage));
        k_place.advance();
    }

    // Writes dQ through the warpgroup's rows of the tile of Q, which nothing reads any more.
    FASTATTN_DEVICE void finish(int group, int i0, const float (&dq)[kHeadDim / 2]) const {
        const float scale = static_cast<float>(p.softmax_scale);
        named_barrier_sync(kGroup + group, 128);
        bool broken = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = fragment_row() + 8 * half;
            float check = 0.f;  // 0 * x is 0 for every finite x, NaN for all others
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) {
                const float x = dq[4 * n + 2 * half], y = dq[4 * n + 2 * half + 1];
                check = fmaf(0.f, x, fmaf(0.f, y, check));
                store_shared(Queries::address(q, 64 * group + row, n) + 2 * fragment_col(),
                             pack<T>(scale * x, scale * y));
            }
            broken = broken || (check != 0.f && i0 + row < work.band.seqlen_q);
        }
        if (work.tiles.masked() > 0 && any_lane(broken)) redo(group, i0);
        fence_proxy_async();
        named_barrier_sync(kGroup + group, 128);
        if (kRagged && i0 + 64 > work.band.seqlen_q) {
            Queries::store_some(q, 64 * group, query_matrix<T>(p.dq, work.band, work.h, p.head_dim_qk).from(i0, 0));
        } else if (thread_index() % 128 == 0) {
            Queries::store_64(q, 64 * group, arguments.dq, work.band.first_q + i0, work.h, work.band.batch);
            bulk_commit();
            bulk_wait<0>();
        }
    }

    // The 16 queries of a warp, for the NaN of keys that they do not see.
    FASTATTN_DEVICE void redo(int group, int i0) const {
        warp_barrier();
#pragma unroll 1
        for (int r = 0; r < 16; ++r) {
            const int row = thread_index() % 128 / 32 * 16 + r;
            if (i0 + row >= work.band.seqlen_q) break;
            RowSum<kHeadDim> dq;
            redo_query_gradient<T>(p, work.band, work.h, work.hk, i0 + row, dq);
            dq.template write<T, kTile.queries>(q, 64 * group + row, static_cast<float>(p.softmax_scale));
        }
    }
};

}  // namespace fastattn::cuda::sm90
