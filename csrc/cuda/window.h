// The one diagonal: key j is visible to query i iff i + offset - left <= j <= i + offset + right.
#pragma once

#include "cuda/ptx/execution.h"
#include "params.h"

namespace fastattn::cuda {

struct Range {
    int64_t begin, end;  // empty where begin >= end
};

FASTATTN_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_DEVICE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// The keys that some query of [i0, i1) may see, widened to whole tiles at the front.
FASTATTN_DEVICE Range visible_keys(const AttentionParams& p, int64_t i0, int64_t i1, int64_t tile) {
    const int64_t begin = max64(0, i0 + p.offset - p.left);
    return {begin / tile * tile, min64(p.seqlen_k, i1 + p.offset + p.right)};
}

// The queries that may see some key of [j0, j1), widened to whole tiles at the front.
FASTATTN_DEVICE Range visible_queries(const AttentionParams& p, int64_t j0, int64_t j1, int64_t tile) {
    const int64_t begin = max64(0, j0 - p.offset - p.right);
    return {begin / tile * tile, min64(p.seqlen_q, j1 - p.offset + p.left)};
}

}  // namespace fastattn::cuda
