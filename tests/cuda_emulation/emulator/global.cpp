// Global memory: ranges that the test allows, races between blocks, what was never written, atomics.
#include <algorithm>
#include <stdexcept>

#include "emulator/machine.h"

namespace fastattn::cuda::emulation {
namespace {

std::vector<std::unique_ptr<Range>> ranges;
Range* last_range = nullptr;
uint32_t launches = 0;

// What a release at an address published, and in which launch.
struct Message {
    Clock clock;
    uint32_t launch = 0;
};
std::unordered_map<const void*, Message> messages;

Range& find(const void* address, uint32_t bytes, bool write, const char* what, Where where) {
    const char* p = static_cast<const char*>(address);
    const auto holds = [&](const Range& r) { return p >= r.begin && p + bytes <= r.end && (!write || r.writable); };
    if (last_range && holds(*last_range)) return *last_range;
    const Range* touched = nullptr;
    for (auto& r : ranges) {
        if (holds(*r)) return *(last_range = r.get());
        if (p < r->end && p + bytes > r->begin) touched = r.get();
    }
    if (!touched) {
        const Range* nearest = nullptr;
        int64_t distance = INT64_MAX;
        for (auto& r : ranges) {
            const int64_t d = p < r->begin ? r->begin - p : p - r->end;
            if (d < distance) distance = d, nearest = r.get();
        }
        if (!nearest) fail(where, "%s: global memory, of which the test has registered none", what);
        fail(where, "%s: global memory outside of every tensor, %lld bytes %s %s", what,
             static_cast<long long>(distance), p < nearest->begin ? "before" : "past the end of",
             nearest->name.c_str());
    }
    if (p < touched->begin || p + bytes > touched->end) {
        fail(where, "%s: %u bytes of global memory that reach out of %s", what, bytes, touched->name.c_str());
    }
    fail(where, "%s: %s is an input", what, touched->name.c_str());
}

// Whether the running warp knows what a warp of some block did until then.
bool ordered(int64_t other, int other_warp, uint32_t clock) {
    const Warp& w = warp();
    if (other == w.block->index) return w.clock.at[other_warp] >= clock;
    if (!w.clock.foreign) return false;
    const auto found = w.clock.foreign->find(other);
    return found != w.clock.foreign->end() && found->second[other_warp] >= clock;
}

template <typename F>
void each_cell(Range& r, const void* address, uint32_t bytes, F f) {
    const size_t begin = static_cast<size_t>(static_cast<const char*>(address) - r.begin);
    for (size_t n = begin / r.element; n < (begin + bytes + r.element - 1) / r.element; ++n) {
        GlobalCell& cell = r.cells[n];
        if (cell.launch != launches) {  // an earlier launch is over before this one begins
            cell.launch = launches;
            cell.write_block = cell.read_block = -1;
            cell.atomic = false;
        }
        f(cell, n);
    }
}

void check_alignment(const void* address, uint32_t alignment, const char* what, Where where) {
    if (reinterpret_cast<uintptr_t>(address) % alignment) {
        fail(where, "%s: global address %p is not a multiple of %u bytes", what, address, alignment);
    }
}

[[noreturn]] void race(Where where, const char* what, const Range& r, size_t element, const char* other, int64_t index,
                       int w) {
    fail(where, "race: %s of element %zu of %s is not ordered after the %s by block %lld warp %d", what, element,
         r.name.c_str(), other, static_cast<long long>(index), w);
}

void access(const void* address, uint32_t bytes, bool write, bool atomic, const char* what, Where where) {
    Range& r = find(address, bytes, write, what, where);
    if (!r.writable) return;
    Warp& w = warp();
    w.dirty = true;
    const uint32_t clock = w.clock.at[w.index];
    each_cell(r, address, bytes, [&](GlobalCell& cell, size_t n) {
        if (!cell.written && (!write || atomic)) {
            fail(where, "%s of element %zu of %s, which nothing has written", what, n, r.name.c_str());
        }
        if (cell.write_block >= 0 && !(atomic && cell.atomic) &&
            !ordered(cell.write_block, cell.write_warp, cell.write_clock)) {
            race(where, what, r, n, cell.atomic ? "atomic operation" : "write", cell.write_block, cell.write_warp);
        }
        if (!write) {
            cell.read_block = w.block->index;
            cell.read_warp = static_cast<uint8_t>(w.index);
            cell.read_clock = clock;
            return;
        }
        if (cell.read_block >= 0 && !ordered(cell.read_block, cell.read_warp, cell.read_clock)) {
            race(where, what, r, n, "read", cell.read_block, cell.read_warp);
        }
        cell.write_block = w.block->index;
        cell.write_warp = static_cast<uint8_t>(w.index);
        cell.write_clock = clock;
        cell.atomic = atomic;
        cell.written = true;
    });
}

Message& message(const void* address) {
    Message& m = messages[address];
    if (m.launch != launches) m = Message{{}, launches};
    return m;
}

// The running block's own clocks under its number, with all that it knows of others.
Clock as_foreign(const Clock& clock) {
    Foreign known = clock.foreign ? *clock.foreign : Foreign();
    auto& own = known[block().index];
    for (int n = 0; n < kMaxWarps; ++n) own[n] = std::max(own[n], clock.at[n]);
    Clock result;
    result.foreign = std::make_shared<const Foreign>(std::move(known));
    return result;
}

void publish(const void* address, Order order) {
    Warp& w = warp();
    Clock clock = w.fenced;
    if (order == Order::kRelease || order == Order::kAcquireRelease) {
        clock = Clock();
        release(clock);
    }
    join(message(address).clock, as_foreign(clock), 0);
}

void take(Clock& to, const Clock& from) {
    join(to, from, 0);
    if (!from.foreign) return;
    const auto own = from.foreign->find(block().index);
    if (own == from.foreign->end()) return;
    for (int n = 0; n < block().warps; ++n) to.at[n] = std::max(to.at[n], own->second[n]);
}

void learn(const void* address, Order order) {
    const Clock& from = message(address).clock;
    take(order == Order::kAcquire || order == Order::kAcquireRelease ? warp().clock : warp().relaxed, from);
}

int32_t read_modify_write(int32_t* address, int32_t value, Order order, const char* what, Where where) {
    write_global(address, 4, 4, true, what, where);
    learn(address, order);
    publish(address, order);
    const int32_t before = *address;
    *address += value;
    machine->wake_global_waiters();
    return before;
}

}  // namespace

void begin_launch() { ++launches; }

void read_global(const void* address, uint32_t bytes, uint32_t alignment, const char* what, Where where) {
    check_alignment(address, alignment, what, where);
    access(address, bytes, false, false, what, where);
}

void write_global(void* address, uint32_t bytes, uint32_t alignment, bool atomic, const char* what, Where where) {
    check_alignment(address, alignment, what, where);
    access(address, bytes, true, atomic, what, where);
}

void load_global(const void* address, void* to, uint32_t bytes, bool constant, Where where) {
    check_alignment(address, bytes, "load", where);
    if (constant && find(address, bytes, false, "load", where).writable) {
        fail(where, "load_global_constant: %s is written by kernels", last_range->name.c_str());
    }
    access(address, bytes, false, false, "load", where);
    std::memcpy(to, address, bytes);
}

void store_global(void* address, const void* from, uint32_t bytes, Where where) {
    write_global(address, bytes, bytes, false, "store", where);
    std::memcpy(address, from, bytes);
}

void reduce_add(float* address, const float* values, int count, Where where) {
    write_global(address, static_cast<uint32_t>(count) * 4, static_cast<uint32_t>(count) * 4, true, "red.add", where);
    for (int n = 0; n < count; ++n) address[n] += values[n];
}

int32_t atomic_add(int32_t* address, int32_t value, Order order, Where where) {
    return read_modify_write(address, value, order, "atom.add", where);
}

int32_t load_acquire(const int32_t* address, Where where) {
    check_alignment(address, 4, "ld.acquire", where);
    Range& r = find(address, 4, false, "ld.acquire", where);
    if (r.writable)
        each_cell(r, address, 4, [&](GlobalCell& cell, size_t n) {
            if (!cell.written)
                fail(where, "ld.acquire of element %zu of %s, which nothing has written", n, r.name.c_str());
            if (cell.write_block >= 0 && !cell.atomic &&
                !ordered(cell.write_block, cell.write_warp, cell.write_clock)) {
                race(where, "ld.acquire", r, n, "plain store", cell.write_block, cell.write_warp);
            }
        });
    learn(address, Order::kAcquire);
    return *address;
}

void store_release(int32_t* address, int32_t value, Where where) {
    write_global(address, 4, 4, true, "st.release", where);
    publish(address, Order::kRelease);
    *address = value;
    machine->wake_global_waiters();
}

void wait_until_equal(const int32_t* address, int32_t value, Where where) {
    while (load_acquire(address, where) != value) {
        machine->global_waiters.push_back(current);
        machine->block_on("wait_until_equal", 0, value, where);
    }
}

void fence_gpu() {
    Warp& w = warp();
    take(w.clock, w.relaxed);
    w.relaxed = Clock();
    release(w.fenced);
}

}  // namespace fastattn::cuda::emulation

// Called by the tests, through ctypes.
using fastattn::cuda::emulation::Range;
#define FASTATTN_EMULATION_EXPORT extern "C" __attribute__((visibility("default")))

// A tensor that kernels may read, and write where writable. Elements have a history of their own; a tensor that is not
// initialised must be written before it is read. It takes the place of writable ranges that it overlaps.
FASTATTN_EMULATION_EXPORT void fastattn_emulation_register(void* data, size_t bytes, uint32_t element, int writable,
                                                           int initialised, const char* name) {
    namespace e = fastattn::cuda::emulation;
    e::last_range = nullptr;
    const char* begin = static_cast<const char*>(data);
    auto range = std::make_unique<Range>(Range{begin, begin + bytes, name, element, writable != 0, {}});
    if (writable) {
        e::GlobalCell cell;
        cell.written = initialised != 0;
        range->cells.assign((bytes + element - 1) / element, cell);
        const auto overlaps = [&](const auto& r) {
            return r->writable && r->begin < range->end && range->begin < r->end;
        };
        e::ranges.erase(std::remove_if(e::ranges.begin(), e::ranges.end(), overlaps), e::ranges.end());
    }
    e::ranges.push_back(std::move(range));
}

FASTATTN_EMULATION_EXPORT void fastattn_emulation_forget() {
    namespace e = fastattn::cuda::emulation;
    e::ranges.clear();
    e::messages.clear();
    e::last_range = nullptr;
}

FASTATTN_EMULATION_EXPORT void fastattn_emulation_configure(int seed, int resident, int banks) {
    fastattn::cuda::emulation::options = {seed, resident, banks != 0};
}

// Since the last call: mma, ldmatrix, its conflicts, shared accesses, their conflicts, switches, wgmma, bulk copies,
// cp.async.
FASTATTN_EMULATION_EXPORT void fastattn_emulation_statistics(uint64_t (&to)[9]) {
    namespace e = fastattn::cuda::emulation;
    const e::Statistics s = e::statistics;
    e::statistics = {};
    const uint64_t all[9] = {
        s.mma, s.ldmatrix, s.ldmatrix_conflicts, s.shared_accesses, s.shared_conflicts, s.switches, s.wgmma,
        s.tma, s.cp_async};
    std::copy(all, all + 9, to);
}
