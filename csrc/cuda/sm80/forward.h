// The loop over the keys that both forward kernels share.
//
//     S = Q K^T;  P = 2^(unit (S - max));  O = O shrink + P V        over tiles of keys, double-buffered by cp.async
//
// Stage of K and V: while S of tile n is computed V of n and K of n + 1 arrive, while O is, V of n + 1.
#pragma once

#include "cuda/band.h"
#include "cuda/online_softmax.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/opaque.h"
#include "cuda/sm80/fragment.h"
#include "cuda/sm80/load.h"
#include "cuda/sm80/tiles.h"

namespace fastattn::cuda::sm80 {

constexpr float kLog2E = 1.4426950408889634f;

template <typename T, int kHeadDim, bool kGeneral>
struct ForwardLoop {
    static constexpr ForwardTile kTile = kGeneral ? general_forward_tile(kHeadDim) : forward_tile(kHeadDim);
    static constexpr int kThreads = kTile.threads();
    static constexpr int kM = kTile.blocks(), kN = kTile.keys / 8, kStep = 16 * kTile.warps;
    using Layout = SwizzledTile<kHeadDim>;
    static constexpr uint32_t kStage = kTile.keys * Layout::kRowBytes;

    static constexpr uint32_t kK = kTile.queries * Layout::kRowBytes, kV = kK + 2 * kStage;  // after Q

    OnlineSoftmax<kM> softmax;
    float out[kM][kHeadDim / 8][4];

    FASTATTN_DEVICE explicit ForwardLoop(float unit) : softmax(unit) {}

    // Row block m of this warp starts at this row of the tile.
    static FASTATTN_DEVICE int first_row(int m) { return m * kStep + warp() * 16; }

    // Visits tiles.at(n) for n in [begin, end); `rules` gets those before masked_end. load_k(to, j0) and load_v start
    // copying a tile; rules(s, j0, n) gives -inf to what is invisible; drop(s, j0) applies dropout to the weights.
    template <typename LoadK, typename LoadV, typename Rules, typename Drop>
    FASTATTN_DEVICE void run(const TileRange& tiles, int begin, int masked_end, int end, bool careful,
                             const LoadK& load_k, const LoadV& load_v, const Rules& rules, const Drop& drop) {
        softmax.reset();
        clear(out);
        if (begin < end) load_k(smem_base() + kK, tiles.at(begin) * kTile.keys);
        cp_async_commit();
        if (begin < end) load_v(smem_base() + kV, tiles.at(begin) * kTile.keys);
        cp_async_commit();
        int n = begin;
        for (; n < masked_end; ++n) step<true>(tiles, begin, n, end, careful, load_k, load_v, rules, drop);
        for (; n < end; ++n) step<false>(tiles, begin, n, end, careful, load_k, load_v, rules, drop);
        cp_async_wait<0>();
    }

private:
    template <bool kMasked, typename LoadK, typename LoadV, typename Rules, typename Drop>
    FASTATTN_DEVICE void step(const TileRange& tiles, int begin, int n, int end, bool careful, const LoadK& load_k,
                              const LoadV& load_v, const Rules& rules, const Drop& drop) {
        const int j0 = (kMasked ? tiles.at(n) : tiles.full(n)) * kTile.keys;
        const int next = n + 1 == end ? -1 : (kMasked ? tiles.at(n + 1) : tiles.full(n + 1)) * kTile.keys;
        const uint32_t q = opaque(smem_base());
        const uint32_t k = q + kK, here = ((n - begin) & 1) * kStage, there = kStage - here;

        cp_async_wait<1>();
        barrier();
        if (next >= 0) load_k(k + there, next);
        cp_async_commit();
        float s[kM][kN][4];
        clear(s);
        multiply_rows<T, kHeadDim, kStep>(s, q + Layout::bytes(warp() * 16), k + here);
        if (kMasked) rules(s, j0, n);
        softmax.template update<kMasked, kGeneral>(s, out);
        drop(s, j0);

        const uint32_t v = opaque(smem_base()) + kV;
        cp_async_wait<1>();
        barrier();
        if (next >= 0) load_v(v + there, next);
        cp_async_commit();
#pragma unroll
        for (int block = 0; block < kTile.keys / 16; ++block) {
            uint32_t weights[kM][4];
#pragma unroll
            for (int m = 0; m < kM; ++m) pack_fragment<T>(weights[m], s[m], block);
            const uint32_t rows = v + here + Layout::bytes(16 * block);
            if (kMasked && careful) {
                multiply_columns_visible<T, kHeadDim, 1>(out, weights, rows, 0);
            } else {
                multiply_columns<T, kHeadDim, 1>(out, weights, rows, 0);
            }
        }
    }
};

}  // namespace fastattn::cuda::sm80
