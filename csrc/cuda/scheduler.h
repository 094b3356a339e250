// Which tile, head and batch entry a block works on.
#pragma once

#include <cstdint>

#include "cuda/ptx/execution.h"


namespace fastattn::cuda {

struct WorkItem {
    int tile;  // 0 first
    int head;  // batch * heads + head
};

// Blocks start in the order of their index. Heads are taken in groups whose keys and values together stay in the L2
// cache; within a group all heads' first tiles come first, so that with tiles numbered longest first (under a causal
// window tiles differ in work) what is left for the end is short. There are tiles * heads blocks, less than 2^31.
FASTATTN_DEVICE WorkItem work_item(int64_t block, int64_t tiles, int64_t heads, int64_t bytes_per_head) {
    constexpr int kL2Bytes = 16 << 20;  // A100: 40 MB in two halves, H100: 50, RTX 4090: 72
    const int count = static_cast<int>(heads), per_head = static_cast<int>(tiles), index = static_cast<int>(block);
    const int bytes = bytes_per_head < 1 ? 1 : bytes_per_head < kL2Bytes ? static_cast<int>(bytes_per_head) : kL2Bytes;
    const int group = kL2Bytes / bytes < count ? kL2Bytes / bytes : count;
    const int first = index / (group * per_head) * group;
    const int in_group = count - first < group ? count - first : group;
    const int rank = index - first * per_head;
    return {rank / in_group, first + rank % in_group};
}

}  // namespace fastattn::cuda
