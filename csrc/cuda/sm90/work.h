// Which tile of queries a block works on, and the keys that it sees.
#pragma once

#include "cuda/band.h"
#include "cuda/scheduler.h"
#include "params.h"

namespace fastattn::cuda::sm90 {

template <int kQueries, int kKeys, bool kPersistent>
struct Work {
    int b, h, hk;     // batch entry, head of queries, head of keys
    int i0;           // the first query
    TileRange tiles;  // of keys

    // The block's work in turn n = 0, 1, ...; false where there is none left.
    FASTATTN_DEVICE bool get(const AttentionParams& p, const Band& band, int turn) {
        const int64_t tiles_q = (p.seqlen_q + kQueries - 1) / kQueries, heads = p.batch * p.heads_q;
        int64_t index = block_index();
        if (kPersistent) {
            // Every other round backwards: who had the longest tile of one round has the shortest of the next.
            index = turn * grid_size() + (turn & 1 ? grid_size() - 1 - index : index);
        } else if (turn > 0) {
            return false;
        }
        if (index >= tiles_q * heads) return false;
        const WorkItem item =
            work_item(index, tiles_q, heads, p.seqlen_k * (p.head_dim_qk + p.head_dim_v) * 2 * p.heads_k / p.heads_q);
        b = static_cast<int>(item.head / p.heads_q), h = static_cast<int>(item.head % p.heads_q);
        hk = h / static_cast<int>(p.heads_q / p.heads_k);
        i0 = static_cast<int>(tiles_q - 1 - item.tile) * kQueries;  // the last sees the most keys
        tiles = band.key_tiles(i0, min32(i0 + kQueries, band.seqlen_q) - 1, kKeys);
        return true;
    }
};

}  // namespace fastattn::cuda::sm90
