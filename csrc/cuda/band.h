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

template <typename T>
FASTATTN_DEVICE T look_up(const Table<T>& table, int64_t first, int64_t second = 0) {
    return load_global(&table.data[first * table.stride[0] + second * table.stride[1]]);
}

// lse and its like are (batches_q, heads_q, rows_q): packed sequences lie one behind the other.
FASTATTN_HOST_DEVICE int64_t batches_q(const AttentionParams& p) { return p.total_q >= 0 ? 1 : p.batch; }
FASTATTN_HOST_DEVICE int64_t rows_q(const AttentionParams& p) { return p.total_q >= 0 ? p.total_q : p.seqlen_q; }
FASTATTN_HOST_DEVICE int64_t all_rows(const AttentionParams& p) { return batches_q(p) * p.heads_q * rows_q(p); }
// k and v likewise, where they are not paged.
FASTATTN_HOST_DEVICE int64_t batches_k(const AttentionParams& p) { return p.total_k >= 0 ? 1 : p.batch; }
FASTATTN_HOST_DEVICE int64_t rows_k(const AttentionParams& p) { return p.total_k >= 0 ? p.total_k : p.seqlen_k; }

// A row of lse and its like by its number.
struct TableRow {
    int64_t batch, h, i;

    static FASTATTN_DEVICE TableRow of(const AttentionParams& p, int64_t row) {
        const auto rows = static_cast<uint64_t>(rows_q(p)), heads = static_cast<uint64_t>(p.heads_q);
        const uint64_t bh = static_cast<uint64_t>(row) / rows;
        return {static_cast<int64_t>(bh / heads), static_cast<int64_t>(bh % heads),
                static_cast<int64_t>(static_cast<uint64_t>(row) - bh * rows)};
    }
    FASTATTN_DEVICE int64_t offset(const Tensor4& x) const {
        return batch * x.stride[0] + h * x.stride[1] + i * x.stride[2];
    }
};

// Rows of k for sequence b, of which it may use fewer.
FASTATTN_DEVICE int room_of(const AttentionParams& p, int64_t b) {
    if (!p.cu_seqlens_k.data) return static_cast<int>(p.seqlen_k);
    return look_up(p.cu_seqlens_k, b + 1) - look_up(p.cu_seqlens_k, b);
}

// Of one sequence: offset_b - left and offset_b + right, its number of queries and keys, and where they lie.
struct Band {
    int lo, hi;              // within [-seqlen_q, seqlen_k]: beyond, they make no difference
    int seqlen_q, seqlen_k;  // below 2^30
    int64_t offset;
    int batch, first_q, first_k;  // index and rows in the tensors: 0 and cu_seqlens when packed, else b, 0 and 0

    // kRagged: whether sequences may have lengths of their own; else bands differ in `batch` only.
    template <bool kRagged = true>
    static FASTATTN_DEVICE Band of(const AttentionParams& p, int64_t b) {
        Band band = {};
        band.batch = kRagged && p.cu_seqlens_q.data ? 0 : static_cast<int>(b);
        band.seqlen_q = static_cast<int>(p.seqlen_q);
        if (kRagged && p.cu_seqlens_q.data) {
            band.first_q = look_up(p.cu_seqlens_q, b);
            band.seqlen_q = look_up(p.cu_seqlens_q, b + 1) - band.first_q;
        }
        if (kRagged && p.cu_seqlens_k.data) band.first_k = look_up(p.cu_seqlens_k, b);
        band.seqlen_k = kRagged && p.seqused_k.data ? look_up(p.seqused_k, b)
                        : kRagged                   ? room_of(p, b)
                                                    : static_cast<int>(p.seqlen_k);
        band.offset = p.relative_offset ? p.offset + band.seqlen_k - band.seqlen_q : p.offset;
        const auto clamp = [&](int64_t x) {
            return static_cast<int>(x < -band.seqlen_q ? -band.seqlen_q : x > band.seqlen_k ? band.seqlen_k : x);
        };
        band.lo = clamp(band.offset - p.left);
        band.hi = clamp(band.offset + p.right);
        return band;
    }

    // Elements from a tensor's first to those of query or key 0 of head h.
    FASTATTN_DEVICE int64_t query_at(const Tensor4& x, int64_t h) const {
        return batch * x.stride[0] + h * x.stride[1] + first_q * x.stride[2];
    }
    FASTATTN_DEVICE int64_t key_at(const Tensor4& x, int64_t h) const {
        return batch * x.stride[0] + h * x.stride[1] + first_k * x.stride[2];
    }
    // The element of lse or its gradient.
    FASTATTN_DEVICE float* row_of(const Tensor4& x, int64_t h, int i) const {
        return static_cast<float*>(x.data) + query_at(x, h) + i * x.stride[2];
    }
    // The row of a dense (batches_q, heads_q, rows_q) table in the workspace.
    FASTATTN_DEVICE int64_t row_index(const AttentionParams& p, int64_t h, int i) const {
        return (batch * p.heads_q + h) * rows_q(p) + first_q + i;
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
