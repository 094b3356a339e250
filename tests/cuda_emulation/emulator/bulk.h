// mbarriers, bulk copies and warpgroups of a block.
#pragma once

#include <list>

#include "emulator/hopper.h"
#include "emulator/machine.h"

namespace fastattn::cuda::emulation {

struct Mbarrier {
    uint64_t word = 0;  // as in shared memory: phase, pending and expected arrivals, bytes
    int phase = 0, pending = 0, count = 0;
    int64_t bytes = 0;
    Clock current, ended;  // of the phase that runs, of the one before
    uint32_t agent = 0, agent_clock = 1;
    int warp = 0, lane = 0, line = 0;  // of mbarrier_init
    uint32_t clock = 0;
    bool fenced = false;
    std::vector<Lane*> waiting;
};

// One box of a tensor, or contiguous bytes where map.rank is 0.
struct BulkCopy {
    TensorMap map;
    int at[5];
    char* global;
    uint32_t shared, mbarrier;
    int bytes, line;
    bool add;
    Clock clock;
    Where where;
};

struct BulkGroups {
    std::vector<BulkCopy> open;
    std::deque<std::vector<BulkCopy>> groups;
};

struct Hopper {
    std::map<uint32_t, Mbarrier> mbarriers;
    std::deque<BulkCopy> loads;
    std::map<Lane*, BulkGroups> stores;
    // The wgmmas of each warpgroup so far: its warps must issue the same ones.
    std::vector<std::vector<std::array<uint64_t, 4>>> issued = std::vector<std::vector<std::array<uint64_t, 4>>>(4);
};

Hopper& hopper(Block& block);

// Of the running warp: reads of shared memory by the async proxy that are over.
void end_read_shared(uint32_t address, uint32_t bytes);
void finish_wgmma(Block& block);

}  // namespace fastattn::cuda::emulation
