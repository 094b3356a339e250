// Which tile of queries a block works on, and the keys that it sees.
#pragma once

#include "cuda/sm90/sequences.h"

namespace fastattn::cuda::sm90 {

template <int kQueries, int kKeys, bool kPersistent, bool kRagged>
struct Work {
    Band band;        // of the sequence
    int h, hk;        // head of queries, of keys
    int i0;           // the first query
    TileRange tiles;  // of keys
    static_assert(!(kPersistent && kRagged));

    // band: that of any sequence, if not kRagged.
    FASTATTN_DEVICE explicit Work(const Band& band) : band(band) {}

    // The block's work in turn n = 0, 1, ...; false where there is none left.
    FASTATTN_DEVICE bool get(const AttentionParams& p, int turn) {
        const auto numbers = SequenceTiles<kQueries, kRagged>::of_queries(p);
        int64_t index = block_index();
        if (kPersistent) {
            // Every other round backwards: who had the longest tile of one round has the shortest of the next.
            index = turn * grid_size() + (turn & 1 ? grid_size() - 1 - index : index);
        } else if (turn > 0) {
            return false;
        }
        if (index >= numbers.blocks(p.heads_q)) return false;
        const auto [b, head, tile] = SequenceTile::of(
            index, numbers, p.heads_q, p.seqlen_k * (p.head_dim_qk + p.head_dim_v) * 2 * p.heads_k / p.heads_q);
        if (kRagged) {
            band = Band::of(p, b);
        } else {
            band.batch = b;
        }
        h = head, hk = h / static_cast<int>(p.heads_q / p.heads_k);
        const int64_t count = kRagged ? (band.seqlen_q + kQueries - 1) / kQueries : numbers.per_sequence();
        if (kRagged && tile >= count) return false;
        i0 = static_cast<int>(count - 1 - tile) * kQueries;  // the last sees the most keys
        tiles = band.key_tiles(i0, min32(i0 + kQueries, band.seqlen_q) - 1, kKeys);
        return true;
    }
};

}  // namespace fastattn::cuda::sm90
