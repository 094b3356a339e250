// The state of a launch: blocks, warps, lanes, and what has been seen of memory.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/api.h"
#include "emulator/context.h"

namespace fastattn::cuda::emulation {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 16;
constexpr int kMaxAgents = 48;  // of a clock: the block's warps, then one for what each mbarrier's copies write
constexpr uint32_t kCell = 4;   // bytes of shared memory with a history of their own

// Set from Python before launches.
struct Options {
    int seed = 0;        // 0: first come, first served; 1: last come, first served; others: random
    int resident = 4;    // blocks that run at the same time
    bool banks = false;  // count bank conflicts of ordinary loads and stores too
};
struct Statistics {
    uint64_t mma = 0, ldmatrix = 0, ldmatrix_conflicts = 0, shared_accesses = 0, shared_conflicts = 0, switches = 0;
    uint64_t wgmma = 0, tma = 0, cp_async = 0, global_sectors = 0;
};
extern Options options;
extern Statistics statistics;

// What of other blocks has been made known by release and acquire: block -> clock of each of its warps.
using Foreign = std::map<int64_t, std::array<uint32_t, kMaxWarps>>;

struct Clock {
    uint32_t at[kMaxAgents] = {};
    std::shared_ptr<const Foreign> foreign;
};
void join(Clock& to, const Clock& from, int agents);

// The history of kCell bytes of shared memory. Of another generation: untouched so far in this block.
struct alignas(64) Cell {
    uint32_t generation;
    uint16_t write_clock, write_line, write_sync;
    uint8_t writer, writer_lane;  // agent; kNobody: nobody wrote
    uint32_t write_fences;        // proxy fences that the writing thread had executed
    uint16_t readers, read_line, read_sync;
    uint8_t reader, reader_lane;  // the last one
    uint8_t pending;              // a copy that will write is in flight: Pending
    uint8_t in_flight;            // asynchronous reads that have not been waited for
    bool generic;                 // written through the generic proxy
    uint16_t read_clock[kMaxWarps];
};
static_assert(sizeof(Cell) == 64);
constexpr uint8_t kNobody = 0xff, kAllLanes = 0xff, kSeveralLanes = 0xfe;
enum Pending : uint8_t { kNone, kCpAsync, kTma };

struct Copy {  // cp.async
    uint32_t shared, bytes;
    const void* global;
    bool valid;
    int line;
};

struct Warp;
struct Block;

struct Lane {
    Context context;
    char* stack = nullptr;
    Warp* warp = nullptr;
    int index = 0;  // in the warp
    bool done = false;
    const char* waits = nullptr;
    int64_t object = 0, operand = 0;  // of what it waits for
    Where where{};
    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> copy_groups;
    uint32_t proxy_fences = 0;
};

struct BankSite {
    uint32_t lanes = 0, bytes = 0, address[kWarp];
};

struct Warp {
    Block* block = nullptr;
    int index = 0;
    uint32_t ready = 0, all = 0;
    bool queued = false, preempt = false;
    Lane lane[kWarp];

    // The collective that lanes are gathering for.
    uint32_t arrived = 0;
    const char* collective = nullptr;
    uint64_t collective_operand = 0;
    Where collective_where{};
    void* arguments[kWarp];

    Clock clock;
    bool dirty = false;  // accesses at the present clock
    uint16_t sync = 1;   // warp-wide barriers so far
    Clock relaxed;       // what relaxed atomics saw, known after a fence
    Clock fenced;        // what relaxed atomics publish: the clock at the last fence
    Clock proxy_fence;   // the clock at the last proxy fence
    std::map<std::pair<int, int>, std::vector<BankSite>> banks;
    struct Wgmma* wgmma = nullptr;  // created on first use
    int registers = 0;
};

struct Barrier {
    int count = 0, expected = 0;
    bool any = false;
    Clock clock;
    std::vector<Lane*> waiting;
};

struct Hopper;  // mbarriers and bulk copies

struct Block {
    int64_t index = 0, x = 0, y = 0, z = 0;
    int threads = 0, warps = 0, agents = 0, alive = 0;
    uint32_t generation = 0;
    std::vector<std::unique_ptr<Warp>> warp;
    char* shared = nullptr;
    std::vector<Cell> cells;
    Barrier barriers[16];
    bool any = false;  // result of the last barrier_or
    Hopper* hopper = nullptr;
};

// A piece of global memory that kernels may use.
struct GlobalCell {
    int64_t write_block = -1, read_block = -1;
    uint32_t launch = 0;  // of what is said here
    uint32_t write_clock = 0, read_clock = 0;
    uint8_t write_warp = 0, read_warp = 0;
    bool atomic = false, written = false;
};
struct Range {
    const char* begin;
    const char* end;
    std::string name;
    uint32_t element;
    bool writable;
    std::vector<GlobalCell> cells;  // one for each element; none where not writable
};

class Machine {
public:
    int64_t grid[3];
    int threads, shared_bytes;
    std::function<void()> body;
    std::vector<std::unique_ptr<Block>> blocks;
    std::string error;

    void run();
    bool failed() const { return !error.empty(); }

    void make_ready(Lane* lane);
    void requeue(Warp* warp);
    void block_on(const char* what, int64_t object, int64_t operand, Where where);
    uint64_t random();
    void wake_global_waiters();
    std::vector<Lane*> global_waiters;

private:
    void start(Block& block, int64_t index);
    void run_warp(Warp& warp);
    Warp* pop();
    bool finish(Block& block);
    void report_deadlock();

    std::deque<Warp*> queue_;
    int64_t next_block_ = 0, total_ = 0;
    uint64_t random_ = 0;
};

// The thread that runs.
extern Machine* machine;
extern Lane* current;
inline Warp& warp() { return *current->warp; }
inline Block& block() { return *current->warp->block; }

[[noreturn]] [[gnu::format(printf, 2, 3)]] void fail(Where where, const char* format, ...);
// An error that belongs to no running thread.
[[gnu::format(printf, 2, 3)]] void fail_block(const Block& block, const char* format, ...);

// Publishes what the running warp has done so far; takes over what another has published.
void release(Clock& to);
void acquire(const Clock& from);

// Gathers all lanes of the warp at one instruction; the last one runs it for all: execute(arguments of the lanes).
template <typename F>
void collective(const char* what, uint64_t operand, void* argument, Where where, F execute) {
    Warp& w = warp();
    if (w.arrived &&
        (w.collective != what || w.collective_operand != operand || w.collective_where.line != where.line)) {
        fail(where, "divergence: %s (operand %llu), while lanes %08x of the warp wait in %s (operand %llu) at line %d",
             what, static_cast<unsigned long long>(operand), w.arrived, w.collective,
             static_cast<unsigned long long>(w.collective_operand), w.collective_where.line);
    }
    w.collective = what;
    w.collective_operand = operand;
    w.collective_where = where;
    w.arguments[current->index] = argument;
    w.arrived |= 1u << current->index;
    if (w.arrived != w.all) {
        machine->block_on(what, 0, 0, where);
        return;
    }
    execute(w.arguments);
    w.arrived = 0;
    w.ready |= w.all & ~(1u << current->index);
    if (options.seed > 1 && machine->random() % 8 == 0) machine->requeue(&w);
}

// Shared memory: bounds and alignment, then the history. lane kAllLanes: the warp as a whole.
char* shared_pointer(uint32_t address);
void check_shared(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, Where where);
struct Access {
    const char* what;
    Where where;
    uint8_t lane;
    bool async_proxy = false;
    bool in_flight = false;            // a read that ends only when it has been waited for
    Pending pending = Pending::kNone;  // a write that ends only when it has been waited for
};
void read_shared(uint32_t address, uint32_t bytes, const Access& access);
void write_shared(uint32_t address, uint32_t bytes, const Access& access);
void land_shared(uint32_t address, uint32_t bytes);  // a copy of the running thread is done
Cell& shared_cell(Block& block, uint32_t offset);

// Global memory.
void read_global(const void* address, uint32_t bytes, uint32_t alignment, const char* what, Where where);
void write_global(void* address, uint32_t bytes, uint32_t alignment, bool atomic, const char* what, Where where);
void begin_launch();

// Hopper: lands one bulk copy that is in flight in the block; false where there is none.
bool land_bulk_copy(Block& block);
void finish_hopper(Block& block);
void reset_hopper(Block& block);
std::string describe_mbarrier(Block& block, uint32_t address);

}  // namespace fastattn::cuda::emulation
