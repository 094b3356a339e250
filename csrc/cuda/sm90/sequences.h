// Tiles of rows of sequences, each of its own length: which tile a block works on.
#pragma once

#include "cuda/band.h"
#include "cuda/scheduler.h"
#include "params.h"

namespace fastattn::cuda::sm90 {

// Whether sequences have lengths of their own. Kernels for such calls are compiled apart, with kRagged.
inline bool is_ragged(const AttentionParams& p) { return p.total_q >= 0 || p.seqused_k.data; }

// The last b < count with first(b) <= x; first rises, and first(0) <= x.
template <typename First>
FASTATTN_DEVICE int last_not_after(int count, int x, const First& first) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first(middle) <= x) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Numbers of tiles of kSize queries or keys. The lengths of packed sequences are known on the device alone. Sequence b,
// with c rows before it, has the numbers from c / kSize + b on, at most one more than its m rows need,
//     ceil(m / kSize) <= floor((c + m) / kSize) - floor(c / kSize) + 1,
// so that the host knows how many there are in all, and the sequence of a number is found by halving. kRagged: whether
// is_ragged() may be true.
template <int kSize, bool kRagged = true>
struct SequenceTiles {
    const Table<int32_t>& cu_seqlens;
    int64_t batch, total, seqlen;  // total: -1: not packed

    static FASTATTN_HOST_DEVICE SequenceTiles of_queries(const AttentionParams& p) {
        return {p.cu_seqlens_q, p.batch, p.total_q, p.seqlen_q};
    }
    static FASTATTN_HOST_DEVICE SequenceTiles of_keys(const AttentionParams& p) {
        return {p.cu_seqlens_k, p.batch, p.total_k, p.seqlen_k};
    }

    FASTATTN_HOST_DEVICE int64_t count() const { return packed() ? total / kSize + batch : batch * per_sequence(); }
    // A block for each and every head. batch * heads is needed again, where 24 registers are all that a thread has.
    FASTATTN_HOST_DEVICE int64_t blocks(int64_t heads) const {
        return kRagged ? count() * heads : per_sequence() * (batch * heads);
    }
    FASTATTN_HOST_DEVICE int64_t per_sequence() const { return (seqlen + kSize - 1) / kSize; }  // not packed

    FASTATTN_DEVICE int first(int b) const {
        return packed() ? look_up(cu_seqlens, b) / kSize + b : b * static_cast<int>(per_sequence());
    }
    FASTATTN_DEVICE int sequence_of(int number) const {
        if (!packed()) return number / static_cast<int>(per_sequence());
        return last_not_after(static_cast<int>(batch), number, [&](int b) { return first(b); });
    }

private:
    FASTATTN_HOST_DEVICE bool packed() const { return kRagged && total >= 0; }
};

struct SequenceTile {
    int b, h;
    int tile;  // of the sequence; where kRagged it may be one that it does not have

    // Of block `index` of count() * heads.
    template <int kSize, bool kRagged>
    static FASTATTN_DEVICE SequenceTile of(int64_t index, const SequenceTiles<kSize, kRagged>& tiles, int64_t heads,
                                           int64_t bytes_per_head) {
        if (kRagged) {
            const WorkItem item = work_item(index, tiles.count(), heads, bytes_per_head);
            const int b = tiles.sequence_of(item.tile);
            return {b, item.head, item.tile - tiles.first(b)};
        }
        const WorkItem item = work_item(index, tiles.per_sequence(), tiles.batch * heads, bytes_per_head);
        return {static_cast<int>(item.head / heads), static_cast<int>(item.head % heads), item.tile};
    }
};

}  // namespace fastattn::cuda::sm90
