// Scheduling, barriers, deadlock.
#include "emulator/machine.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <stdexcept>

#if defined(__x86_64__)
asm(R"(
.text
.globl fastattn_emulation_switch
.hidden fastattn_emulation_switch
.type fastattn_emulation_switch,@function
fastattn_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastattn_emulation_switch,.-fastattn_emulation_switch
)");
#endif

namespace fastattn::cuda::emulation {

Options options;
Statistics statistics;
Machine* machine = nullptr;
Lane* current = nullptr;

namespace {

constexpr size_t kStack = 256 << 10;
Context scheduler;

const char* base_name(const char* path) {
    const char* slash = path ? std::strrchr(path, '/') : nullptr;
    return slash ? slash + 1 : path ? path : "?";
}

std::string format(const char* text, va_list arguments) {
    char buffer[1024];
    std::vsnprintf(buffer, sizeof buffer, text, arguments);
    return buffer;
}

std::string print(const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    std::string result = format(text, arguments);
    va_end(arguments);
    return result;
}

char* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA emulation: no memory");
    return static_cast<char*>(memory);
}

// Stacks, shared memory and histories are kept from launch to launch.
std::vector<char*>& stacks() {
    static std::vector<char*> all;
    return all;
}
std::vector<std::unique_ptr<Block>>& spare_blocks() {
    static std::vector<std::unique_ptr<Block>> all;
    return all;
}

char* take_stack() {
    if (stacks().empty()) return map(kStack);
    char* stack = stacks().back();
    stacks().pop_back();
    return stack;
}

void give_back_stack(Lane& lane) {
    if (lane.stack) stacks().push_back(lane.stack);
    lane.stack = nullptr;
}

constexpr int kMaxShared = 228 << 10;

std::unique_ptr<Block> take_block() {
    if (!spare_blocks().empty()) {
        auto block = std::move(spare_blocks().back());
        spare_blocks().pop_back();
        return block;
    }
    auto block = std::make_unique<Block>();
    block->shared = map(kMaxShared);
    block->cells.resize(kMaxShared / kCell);
    return block;
}

void enter() {
    machine->body();
    Lane* lane = current;
    lane->done = true;
    --lane->warp->block->alive;
    Context::swap(lane->context, scheduler);
    __builtin_trap();
}

}  // namespace

void fail(Where where, const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    const std::string what = format(text, arguments);
    va_end(arguments);
    if (machine->error.empty()) {
        const Block& b = block();
        machine->error = print("%s\n    at %s:%d, block (%lld, %lld, %lld), warp %d, lane %d", what.c_str(),
                               base_name(where.file), where.line, static_cast<long long>(b.x),
                               static_cast<long long>(b.y), static_cast<long long>(b.z), warp().index, current->index);
    }
    Context::swap(current->context, scheduler);  // never resumed
    __builtin_trap();
}

void fail_block(const Block& b, const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    const std::string what = format(text, arguments);
    va_end(arguments);
    if (machine->error.empty()) {
        machine->error = print("%s\n    in block (%lld, %lld, %lld)", what.c_str(), static_cast<long long>(b.x),
                               static_cast<long long>(b.y), static_cast<long long>(b.z));
    }
}

void join(Clock& to, const Clock& from, int agents) {
    for (int n = 0; n < agents; ++n) to.at[n] = to.at[n] > from.at[n] ? to.at[n] : from.at[n];
    if (!from.foreign || from.foreign == to.foreign) return;
    if (!to.foreign) {
        to.foreign = from.foreign;
        return;
    }
    auto merged = std::make_shared<Foreign>(*to.foreign);
    for (const auto& [index, clock] : *from.foreign) {
        auto& mine = (*merged)[index];
        for (int n = 0; n < kMaxWarps; ++n) mine[n] = mine[n] > clock[n] ? mine[n] : clock[n];
    }
    to.foreign = std::move(merged);
}

// Accesses at the present clock are published by going on to the next one.
void release(Clock& to) {
    Warp& w = warp();
    uint32_t& own = w.clock.at[w.index];
    if (w.dirty) {
        join(to, w.clock, w.block->agents);
        if (++own > 0xfff0) fail(w.collective_where, "the emulator's clocks overflow: too many barriers in one block");
        w.dirty = false;
    } else {
        --own;
        join(to, w.clock, w.block->agents);
        ++own;
    }
}

void acquire(const Clock& from) { join(warp().clock, from, block().agents); }

uint64_t Machine::random() {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    return random_ >> 33;
}

void Machine::make_ready(Lane* lane) {
    Warp& w = *lane->warp;
    w.ready |= 1u << lane->index;
    lane->waits = nullptr;
    if (!w.queued && &w != (current ? current->warp : nullptr)) {
        w.queued = true;
        queue_.push_back(&w);
    }
}

void Machine::requeue(Warp* w) {
    w->preempt = true;
    w->ready |= 1u << current->index;
    Context::swap(current->context, scheduler);
}

void Machine::block_on(const char* what, int64_t object, int64_t operand, Where where) {
    Lane* lane = current;
    lane->waits = what;
    lane->object = object;
    lane->operand = operand;
    lane->where = where;
    ++statistics.switches;
    Context::swap(lane->context, scheduler);
    lane->waits = nullptr;
}

void Machine::wake_global_waiters() {
    std::vector<Lane*> woken;
    woken.swap(global_waiters);
    for (Lane* lane : woken) make_ready(lane);
}

Warp* Machine::pop() {
    if (queue_.empty()) return nullptr;
    if (options.seed == 1) {
        Warp* w = queue_.back();
        queue_.pop_back();
        return w;
    }
    if (options.seed > 1) std::swap(queue_.front(), queue_[random() % queue_.size()]);
    Warp* w = queue_.front();
    queue_.pop_front();
    return w;
}

void Machine::start(Block& b, int64_t index) {
    static uint32_t generation = 0;
    b.index = index;
    b.x = index % grid[0];
    b.y = index / grid[0] % grid[1];
    b.z = index / grid[0] / grid[1];
    b.generation = ++generation;
    b.threads = b.alive = threads;
    b.warps = b.agents = (threads + kWarp - 1) / kWarp;
    std::memset(b.shared, 0xff, shared_bytes);
    for (Barrier& barrier : b.barriers) barrier = Barrier();
    reset_hopper(b);
    b.warp.clear();
    for (int n = 0; n < b.warps; ++n) {
        b.warp.push_back(std::make_unique<Warp>());
        Warp& w = *b.warp.back();
        w.block = &b;
        w.index = n;
        w.clock.at[n] = 1;
        w.registers = std::min(255, 65536 / threads / 8 * 8);
        const int lanes = std::min(kWarp, threads - n * kWarp);
        w.all = lanes == kWarp ? ~0u : (1u << lanes) - 1;
        for (int l = 0; l < lanes; ++l) {
            Lane& lane = w.lane[l];
            lane.stack = take_stack();
            lane.warp = &w;
            lane.index = l;
            lane.context.start(lane.stack, kStack, enter);
        }
        w.ready = w.all;
        w.queued = true;
        queue_.push_back(&w);
    }
}

void Machine::run_warp(Warp& w) {
    w.preempt = false;
    while (w.ready && !failed() && !w.preempt) {
        const int l = options.seed % 2 ? 31 - __builtin_clz(w.ready) : __builtin_ctz(w.ready);
        w.ready &= ~(1u << l);
        current = &w.lane[l];
        Context::swap(scheduler, current->context);
    }
    current = nullptr;
    if (w.ready && !w.queued) {
        w.queued = true;
        queue_.push_back(&w);
    }
}

// Whether the block is done; checks what it left behind.
bool Machine::finish(Block& b) {
    if (b.alive) return false;
    for (const auto& w : b.warp) {
        for (Lane& lane : w->lane) {
            for (const auto& group : lane.copy_groups) {
                if (!group.empty()) fail_block(b, "warp %d ends before it has waited for cp.async", w->index);
            }
            if (!lane.open_copies.empty())
                fail_block(b, "warp %d ends with a cp.async that it never committed", w->index);
            give_back_stack(lane);
        }
    }
    for (int n = 0; n < 16; ++n) {
        if (b.barriers[n].count)
            fail_block(b, "the block ends while barrier %d has %d arrivals", n, b.barriers[n].count);
    }
    finish_hopper(b);
    return true;
}

void Machine::run() {
    total_ = grid[0] * grid[1] * grid[2];
    random_ = static_cast<uint64_t>(options.seed) * 7919 + 1;
    begin_launch();
    const int64_t resident = std::min<int64_t>(std::max(1, options.resident), total_);
    for (int64_t n = 0; n < resident; ++n) {
        blocks.push_back(take_block());
        start(*blocks.back(), next_block_++);
    }
    size_t running = blocks.size();
    while (running && !failed()) {
        Warp* w = pop();
        if (!w) {
            bool landed = false;
            for (auto& b : blocks) landed = landed || (b->alive && land_bulk_copy(*b));
            if (!landed && !failed()) report_deadlock();
            continue;
        }
        w->queued = false;
        run_warp(*w);
        Block& b = *w->block;
        if (failed() || !finish(b)) continue;
        if (next_block_ < total_ && !failed()) {
            start(b, next_block_++);
        } else {
            --running;
        }
    }
    for (auto& b : blocks) {
        for (auto& w : b->warp) {
            for (Lane& lane : w->lane) give_back_stack(lane);  // of threads that an error stopped
        }
        spare_blocks().push_back(std::move(b));
    }
}

void Machine::report_deadlock() {
    std::map<std::string, std::map<std::string, uint32_t>> groups;
    for (auto& b : blocks) {
        for (auto& w : b->warp) {
            const std::string name = print("block (%lld, %lld, %lld) warp %d", static_cast<long long>(b->x),
                                           static_cast<long long>(b->y), static_cast<long long>(b->z), w->index);
            for (int l = 0; l < kWarp; ++l) {
                Lane& lane = w->lane[l];
                if (!(w->all >> l & 1)) continue;
                std::string what = "has ended";
                if (!lane.done) {
                    what = print("waits in %s", lane.waits ? lane.waits : "?");
                    if (!std::strncmp(what.c_str(), "waits in mbarrier", 17)) {
                        what += describe_mbarrier(*b, static_cast<uint32_t>(lane.object));
                        what += print(", for the phase of parity %d to end", static_cast<int>(lane.operand));
                    } else if (!std::strncmp(what.c_str(), "waits in barrier", 16)) {
                        what += print(" %d, where %d of %d threads are", static_cast<int>(lane.object),
                                      b->barriers[lane.object].count, static_cast<int>(lane.operand));
                    } else if (!std::strncmp(what.c_str(), "waits in wait_until", 19)) {
                        what += print(" for %d", static_cast<int>(lane.operand));
                    }
                    what += print(" at %s:%d", base_name(lane.where.file), lane.where.line);
                }
                groups[what][name] |= 1u << l;
            }
        }
    }
    error = "deadlock";
    if (next_block_ < total_)
        error += print(" (%lld more blocks have not started)", static_cast<long long>(total_ - next_block_));
    for (const auto& [what, who] : groups) {
        error += "\n    " + what + ":";
        int shown = 0;
        for (const auto& [name, lanes] : who) {
            if (++shown > 12) break;
            error += "\n        " + name + (lanes == ~0u ? "" : print(" lanes %08x", lanes));
        }
        if (shown > 12) error += print("\n        and %zu more warps", who.size() - 12);
    }
}

void launch(int64_t x, int64_t y, int64_t z, int threads, int shared_bytes, std::function<void()> body) {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    if (threads < 1 || threads > kMaxWarps * kWarp)
        throw std::runtime_error("CUDA emulation: a block has 1 to 512 threads");
    if (shared_bytes > kMaxShared - 1024)
        throw std::runtime_error("CUDA emulation: a block has at most 227 KiB of shared memory");
    Machine m;
    m.grid[0] = x;
    m.grid[1] = y;
    m.grid[2] = z;
    m.threads = threads;
    m.shared_bytes = shared_bytes;
    m.body = std::move(body);
    machine = &m;
    m.run();
    machine = nullptr;
    current = nullptr;
    if (m.failed()) throw std::runtime_error("CUDA emulation: " + m.error);
}

int thread_index() { return warp().index * kWarp + current->index; }
int64_t block_index(int axis) { return axis == 0 ? block().x : axis == 1 ? block().y : block().z; }
int64_t grid_size() { return machine->grid[0]; }

static bool arrive(int id, int threads, bool wait, bool condition, Where where) {
    Block& b = block();
    const int all = threads ? threads : b.threads;
    if (id < 0 || id > 15) fail(where, "barrier %d: its number is 0 to 15", id);
    if (threads && (threads % kWarp || threads > b.threads || threads < 0)) {
        fail(where, "barrier %d for %d threads: whole warps of the block's %d threads", id, threads, b.threads);
    }
    Barrier& barrier = b.barriers[id];
    if (barrier.count && barrier.expected != all) {
        fail(where, "barrier %d for %d threads, while others wait there for %d", id, all, barrier.expected);
    }
    barrier.expected = all;
    barrier.any = barrier.any || condition;
    ++barrier.count;
    release(barrier.clock);
    if (barrier.count < all) {
        if (!wait) return false;
        barrier.waiting.push_back(current);
        machine->block_on("barrier", id, all, where);
        return current->operand != 0;
    }
    Barrier done = std::move(barrier);
    barrier = Barrier();
    for (Lane* lane : done.waiting) {
        join(lane->warp->clock, done.clock, b.agents);
        ++lane->warp->sync;
        lane->operand = done.any;
        machine->make_ready(lane);
    }
    if (wait) {
        acquire(done.clock);
        ++warp().sync;
    }
    return done.any;
}

void barrier(int id, int threads, bool wait, Where where) { arrive(id, threads, wait, false, where); }
bool barrier_or(bool condition, Where where) { return arrive(0, 0, true, condition, where); }

}  // namespace fastattn::cuda::emulation
