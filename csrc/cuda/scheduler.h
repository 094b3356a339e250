// Which tile, head and batch entry a block works on.
#pragma once

#include <cstdint>

#include "cuda/ptx/execution.h"


namespace fastattn::cuda {

struct WorkItem {
    int tile;      // 0 first
    int64_t head;  // batch * heads + head
};

// Blocks start in the order of their index. Heads are taken in groups whose keys and values together stay in the L2
// cache; within a group all heads' first tiles come first, so that with tiles numbered longest first (under a causal
// window tiles differ in work) what is left for the end is short.
FASTATTN_DEVICE WorkItem work_item(int64_t block, int64_t tiles, int64_t heads, int64_t bytes_per_head) {
    constexpr int64_t kL2Bytes = int64_t{16} << 20;  // A100: 40 MB in two halves, H100: 50, RTX 4090: 72
    int64_t group = kL2Bytes / (bytes_per_head > 0 ? bytes_per_head : 1);
    group = group < 1 ? 1 : group < heads ? group : heads;
    const int64_t first = block / (group * tiles) * group;
    const int64_t in_group = heads - first < group ? heads - first : group;
    const int64_t rank = block - first * tiles;
    return {static_cast<int>(rank / in_group), first + rank % in_group};
}

}  // namespace fastattn::cuda
