// The one diagonal in 32-bit arithmetic: key j is visible to query i iff lo <= j - i <= hi.
#pragma once

#include "cuda/ptx/execution.h"
#include "cuda/ptx/global.h"
#include "params.h"

namespace fastattn::cuda {

FASTATTN_DEVICE int min32(int a, int b) { return a < b ? a : b; }
FASTATTN_DEVICE int max32(int a, int b) { return a > b ? a : b; }

// Tiles [first, last) of which those in [full_first, full_last) are visible to every row of the other side; the rest is
// visited first, so that one loop looks at indices and one does not.
struct TileRange {
    int first, last, full_first, full_last;

    FASTATTN_DEVICE int count() const { return last - first; }
    FASTATTN_DEVICE int masked() const { return count() - (full_last - full_first); }
    // The tile visited in turn n: those beyond the full ones, those before, the full ones.
    FASTATTN_DEVICE int at(int n) const {
        const int beyond = last - full_last, before = full_first - first;
        return n < beyond ? full_last + n : n < beyond + before ? first + n - beyond : full(n);
    }
    // The same where n is known to be masked() or more.
    FASTATTN_DEVICE int full(int n) const { return n + full_last - count(); }
};

// Of one sequence: offset_b - left and offset_b + right, the sequence's number of queries and keys.
struct Band {
    int lo, hi;              // within [-seqlen_q, seqlen_k]: beyond, they make no difference
    int seqlen_q, seqlen_k;  // below 2^30
    int64_t offset;

    static FASTATTN_DEVICE Band of(const AttentionParams& p, int64_t b) {
        const int64_t seqlen_k = p.seqused_k.data ? load_global(&p.seqused_k.data[b * p.seqused_k.stride[0]]) : p.seqlen_k;
        const int64_t offset = p.relative_offset ? p.offset + seqlen_k - p.seqlen_q : p.offset;
        const auto clamp = [&](int64_t x) {
            return static_cast<int>(x < -p.seqlen_q ? -p.seqlen_q : x > seqlen_k ? seqlen_k : x);
        };
        return {clamp(offset - p.left), clamp(offset + p.right), static_cast<int>(p.seqlen_q),
                static_cast<int>(seqlen_k), offset};
    }

    // Query i sees the keys [keys_begin(i), keys_end(i)), none where that is empty.
    FASTATTN_DEVICE int keys_begin(int i) const { return max32(0, i + lo); }
    FASTATTN_DEVICE int keys_end(int i) const { return min32(seqlen_k, i + hi + 1); }
    // Key j is seen by the queries [queries_begin(j), queries_end(j)).
    FASTATTN_DEVICE int queries_begin(int j) const { return max32(0, j - hi); }
    FASTATTN_DEVICE int queries_end(int j) const { return j < seqlen_k ? min32(seqlen_q, j - lo + 1) : 0; }

    // Tiles of `size` keys for the queries i0 .. i1 (inclusive), which exist.
    FASTATTN_DEVICE TileRange key_tiles(int i0, int i1, int size) const {
        return tiles(keys_begin(i0), keys_end(i1), keys_begin(i1), keys_end(i0), size);
    }
    // Tiles of `size` queries for the keys j0 .. j1 (inclusive), none of them full if j1 does not exist.
    FASTATTN_DEVICE TileRange query_tiles(int j0, int j1, int size) const {
        if (j0 >= seqlen_k) return {};
        const int last = min32(j1, seqlen_k - 1);
        return tiles(queries_begin(j0), queries_end(last), queries_begin(last), j1 > last ? 0 : queries_end(j0), size);
    }

    // All tiles of `size` of so many keys or queries, none of them taken to be full.
    static FASTATTN_DEVICE TileRange all_tiles(int count, int size) {
        const int tiles = (count + size - 1) / size;
        return {0, tiles, tiles, tiles};
    }

private:
    static FASTATTN_DEVICE TileRange tiles(int begin, int end, int full_begin, int full_end, int size) {
        TileRange range;
        range.first = begin / size;
        range.last = max32((max32(end, 0) + size - 1) / size, range.first);
        range.full_first = min32((full_begin + size - 1) / size, range.last);
        range.full_last = max32(min32(max32(full_end, 0) / size, range.last), range.full_first);
        return range;
    }
};

}  // namespace fastattn::cuda
