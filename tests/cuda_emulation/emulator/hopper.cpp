// mbarriers and bulk copies. A load lands when no thread can run, the latest moment that the program allows; a store or
// a reduction when its thread waits for it.
#include "emulator/bulk.h"
#include "emulator/convert.h"

namespace fastattn::cuda::emulation {

Hopper& hopper(Block& b) {
    if (!b.hopper) b.hopper = new Hopper;
    return *b.hopper;
}

void reset_hopper(Block& b) {
    delete b.hopper;
    b.hopper = nullptr;
}

void finish_hopper(Block& b) {
    finish_wgmma(b);
    int registers = 0;
    for (const auto& w : b.warp) registers += w->registers;
    if (registers > b.warps * std::min(255, 65536 / b.threads / 8 * 8)) {
        fail_block(b, "setmaxnreg: the warps end with more registers than the block was launched with");
    }
    if (!b.hopper) return;
    for (const BulkCopy& copy : b.hopper->loads) {
        fail_block(b, "the block ends before it has waited for the bulk load at line %d", copy.line);
    }
    for (const auto& [lane, stores] : b.hopper->stores) {
        if (!stores.open.empty() || !stores.groups.empty()) {
            fail_block(b, "warp %d ends before it has committed and waited for its bulk stores", lane->warp->index);
        }
    }
}

namespace {

Mbarrier& find(uint32_t address, const char* what, Where where) {
    check_shared(address, 8, 8, what, where);
    auto& all = hopper(block()).mbarriers;
    const auto found = all.find(address);
    if (found == all.end()) fail(where, "%s: shared memory + 0x%x is not an mbarrier", what, address - kSharedBase);
    Mbarrier& m = found->second;
    if (std::memcmp(shared_pointer(address), &m.word, 8)) {
        fail(where, "%s: the mbarrier at shared memory + 0x%x has been overwritten", what, address - kSharedBase);
    }
    const Warp& w = warp();
    if (w.clock.at[m.warp] < m.clock) {
        fail(where, "race: %s on the mbarrier at shared memory + 0x%x is not ordered after its init at line %d", what,
             address - kSharedBase, m.line);
    }
    return m;
}

void store_word(Mbarrier& m, char* at) {
    m.word = static_cast<uint64_t>(m.phase) | static_cast<uint64_t>(m.pending) << 1 |
             static_cast<uint64_t>(m.count) << 21 | static_cast<uint64_t>(m.bytes) << 41;
    std::memcpy(at, &m.word, 8);
}

void update(Mbarrier& m, char* at) {
    if (m.pending == 0 && m.bytes == 0) {
        m.phase ^= 1;
        m.pending = m.count;
        m.ended = m.current;
        ++m.agent_clock;
        for (Lane* lane : m.waiting) machine->make_ready(lane);
        m.waiting.clear();
    }
    store_word(m, at);
}

}  // namespace

void mbarrier_init(uint32_t address, int count, Where where) {
    check_shared(address, 8, 8, "mbarrier_init", where);
    if (count < 1 || count >= 1 << 20) fail(where, "mbarrier_init: a count of %d", count);
    write_shared(address, 8, {"mbarrier_init", where, static_cast<uint8_t>(current->index)});
    Block& b = block();
    Mbarrier& m = hopper(b).mbarriers[address];
    m = Mbarrier();
    if (b.agents == kMaxAgents)
        fail(where, "more than %d mbarriers in a block of %d warps", kMaxAgents - b.warps, b.warps);
    m.agent = static_cast<uint32_t>(b.agents++);
    m.count = m.pending = count;
    m.warp = warp().index;
    m.lane = current->index;
    m.line = where.line;
    m.clock = warp().clock.at[m.warp];
    store_word(m, shared_pointer(address));
}

void fence_mbarrier_init() {
    for (auto& [address, m] : hopper(block()).mbarriers) {
        if (m.warp == warp().index && m.lane == current->index) m.fenced = true;
    }
}

void fence_proxy_async() {
    ++current->proxy_fences;
    join(warp().proxy_fence, warp().clock, block().agents);
    warp().dirty = true;
    Clock nobody;  // what follows is later than the fence
    release(nobody);
    fence_mbarrier_init();
}

void mbarrier_arrive(uint32_t address, int expected_bytes, Where where) {
    Mbarrier& m = find(address, "mbarrier_arrive", where);
    if (m.pending == 0) fail(where, "mbarrier_arrive: more arrivals than the count of %d in one phase", m.count);
    if (expected_bytes < 0 || expected_bytes >= 1 << 20) fail(where, "mbarrier: %d bytes expected", expected_bytes);
    release(m.current);
    --m.pending;
    m.bytes += expected_bytes;
    update(m, shared_pointer(address));
}

bool mbarrier_try_wait(uint32_t address, int parity, Where where) {
    Mbarrier& m = find(address, "mbarrier_wait", where);
    if (parity != 0 && parity != 1) fail(where, "mbarrier_wait: a parity of %d", parity);
    if (m.phase == parity) return false;
    acquire(m.ended);
    ++warp().sync;
    return true;
}

void mbarrier_wait(uint32_t address, int parity, Where where) {
    while (!mbarrier_try_wait(address, parity, where)) {
        hopper(block()).mbarriers[address].waiting.push_back(current);
        machine->block_on("mbarrier_wait", address, parity, where);
    }
}

std::string describe_mbarrier(Block& b, uint32_t address) {
    const auto& all = hopper(b).mbarriers;
    const auto found = all.find(address);
    if (found == all.end()) return "";
    const Mbarrier& m = found->second;
    return " at shared memory + " + std::to_string(address - kSharedBase) + " (phase of parity " +
           std::to_string(m.phase) + ", " + std::to_string(m.pending) + " of " + std::to_string(m.count) +
           " arrivals and " + std::to_string(m.bytes) + " bytes missing)";
}

namespace {

// f(address in shared memory, address in global memory or null outside of the tensor) for each element of the box.
template <typename F>
void each_element(const BulkCopy& copy, F f) {
    const TensorMap& map = copy.map;
    if (map.rank == 0) {
        for (int n = 0; n < copy.bytes; n += 4) f(copy.shared + static_cast<uint32_t>(n), copy.global + n);
        return;
    }
    const int size = map.element_bytes(), rows = map.bytes() / size / map.box[0];
    const uint32_t chunks = static_cast<uint32_t>(map.swizzle_bytes) / 16;
    for (int row = 0; row < rows; ++row) {
        int rest = row;
        char* global = map.base;
        bool inside = true;
        for (int n = 1; n < map.rank; ++n) {
            const int64_t x = copy.at[n] + rest % map.box[n];
            rest /= map.box[n];
            inside = inside && 0 <= x && x < map.dim[n];
            global += x * map.stride[n];
        }
        for (int n = 0; n < map.box[0]; ++n) {
            const int64_t x = copy.at[0] + n;
            uint32_t address = copy.shared + static_cast<uint32_t>((row * map.box[0] + n) * size);
            if (chunks > 1) address ^= (address >> 3) & ((chunks - 1) << 4);
            f(address, inside && 0 <= x && x < map.dim[0] ? global + x * size : nullptr);
        }
    }
}

void check_box(const TensorMap& map, uint32_t shared, const char* what, Where where) {
    check_shared(shared, static_cast<uint32_t>(map.bytes()), map.swizzle_bytes ? 8u * map.swizzle_bytes : 128u, what,
                 where);
}

void check_bytes(const void* global, uint32_t shared, int bytes, const char* what, Where where) {
    if (bytes <= 0 || bytes % 16) fail(where, "%s: %d bytes, not a multiple of 16", what, bytes);
    check_shared(shared, static_cast<uint32_t>(bytes), 16, what, where);
    if (reinterpret_cast<uintptr_t>(global) % 16)
        fail(where, "%s: global address %p is not a multiple of 16", what, global);
}

int element_bytes(const BulkCopy& copy) { return copy.map.rank ? copy.map.element_bytes() : 4; }

// Every global address that the copy touches, when it is issued: ranges and races.
void check_global(const BulkCopy& copy, bool write, const char* what) {
    const auto size = static_cast<uint32_t>(element_bytes(copy));
    each_element(copy, [&](uint32_t, char* global) {
        if (!global) return;
        if (write) {
            write_global(global, size, size, copy.add, what, copy.where);
        } else {
            read_global(global, size, size, what, copy.where);
        }
    });
}

void issue_load(BulkCopy copy, const char* what) {
    const Where where = copy.where;
    Mbarrier& m = find(copy.mbarrier, what, where);
    if (!m.fenced) {
        fail(where, "%s: the mbarrier's init at line %d has no fence_mbarrier_init() after it", what, m.line);
    }
    check_global(copy, false, what);
    write_shared(copy.shared, static_cast<uint32_t>(copy.bytes),
                 {what, where, static_cast<uint8_t>(current->index), true, false, kTma});
    std::memset(shared_pointer(copy.shared), 0xff, static_cast<size_t>(copy.bytes));
    release(copy.clock);
    ++statistics.tma;
    hopper(block()).loads.push_back(copy);
}

void issue_store(BulkCopy copy, const char* what) {
    read_shared(copy.shared, static_cast<uint32_t>(copy.bytes),
                {what, copy.where, static_cast<uint8_t>(current->index), true, true});
    check_global(copy, true, what);
    ++statistics.tma;
    hopper(block()).stores[current].open.push_back(copy);
}

float to_float(Element element, const char* p) {
    uint16_t bits;
    float x;
    if (element == Element::kFloat32) return std::memcpy(&x, p, 4), x;
    std::memcpy(&bits, p, 2);
    return element == Element::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

void from_float(Element element, float x, char* p) {
    if (element == Element::kFloat32) {
        std::memcpy(p, &x, 4);
        return;
    }
    const uint16_t bits = element == Element::kFloat16 ? float_to_half(x) : float_to_bfloat16(x);
    std::memcpy(p, &bits, 2);
}

BulkCopy box(const TensorMap& map, uint32_t shared, const int (&at)[5], Where where) {
    BulkCopy copy{};
    copy.map = map;
    std::copy(at, at + 5, copy.at);
    copy.shared = shared;
    copy.bytes = map.bytes();
    copy.line = where.line;
    copy.where = where;
    return copy;
}

BulkCopy bytes_of(void* global, uint32_t shared, int bytes, Where where) {
    BulkCopy copy{};
    copy.global = static_cast<char*>(global);
    copy.shared = shared;
    copy.bytes = bytes;
    copy.line = where.line;
    copy.where = where;
    return copy;
}

}  // namespace

void fail_rank(int rank, int dimensions, Where where) {
    fail(where, "tma: %d coordinates for a tensor map of rank %d", dimensions, rank);
}

void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, const int (&at)[5], Where where) {
    check_box(map, shared, "tma_load", where);
    BulkCopy copy = box(map, shared, at, where);
    copy.mbarrier = mbarrier;
    issue_load(copy, "tma_load");
}

void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t mbarrier, Where where) {
    check_bytes(global, shared, bytes, "bulk_load", where);
    BulkCopy copy = bytes_of(const_cast<void*>(global), shared, bytes, where);
    copy.mbarrier = mbarrier;
    issue_load(copy, "bulk_load");
}

void tma_store(const TensorMap& map, uint32_t shared, const int (&at)[5], bool add, Where where) {
    check_box(map, shared, "tma_store", where);
    BulkCopy copy = box(map, shared, at, where);
    copy.add = add;
    issue_store(copy, add ? "tma_reduce_add" : "tma_store");
}

void bulk_store(void* global, uint32_t shared, int bytes, bool add, Where where) {
    check_bytes(global, shared, bytes, "bulk_store", where);
    BulkCopy copy = bytes_of(global, shared, bytes, where);
    copy.add = add;
    issue_store(copy, add ? "bulk_reduce_add" : "bulk_store");
}

bool land_bulk_copy(Block& b) {
    if (!b.hopper || b.hopper->loads.empty()) return false;
    auto& loads = b.hopper->loads;
    const size_t n = options.seed > 1 ? machine->random() % loads.size() : options.seed == 1 ? loads.size() - 1 : 0;
    const BulkCopy copy = loads[n];
    loads.erase(loads.begin() + static_cast<long>(n));
    const auto size = static_cast<size_t>(element_bytes(copy));
    each_element(copy, [&](uint32_t address, const char* global) {
        char* to = b.shared + (address - kSharedBase);
        global ? std::memcpy(to, global, size) : std::memset(to, 0, size);
    });
    Mbarrier& m = b.hopper->mbarriers[copy.mbarrier];
    const uint32_t begin = copy.shared - kSharedBase;
    for (uint32_t offset = begin; offset < begin + static_cast<uint32_t>(copy.bytes); offset += kCell) {
        Cell& cell = shared_cell(b, offset);
        cell.pending = kNone;
        cell.writer = static_cast<uint8_t>(m.agent);
        cell.write_clock = static_cast<uint16_t>(m.agent_clock);
    }
    join(m.current, copy.clock, b.agents);
    m.current.at[m.agent] = m.agent_clock;
    m.bytes -= copy.bytes;
    if (m.bytes <= -(1 << 20)) fail_block(b, "an mbarrier got more bytes than were expected");
    update(m, b.shared + (copy.mbarrier - kSharedBase));
    return true;
}

void bulk_commit(Where) {
    BulkGroups& mine = hopper(block()).stores[current];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

void bulk_wait(int pending, bool, Where where) {
    BulkGroups& mine = hopper(block()).stores[current];
    while (mine.groups.size() > static_cast<size_t>(pending)) {
        for (const BulkCopy& copy : mine.groups.front()) {
            const auto size = static_cast<size_t>(element_bytes(copy));
            const Element element = copy.map.rank ? copy.map.element : Element::kFloat32;
            each_element(copy, [&](uint32_t address, char* global) {
                if (!global) return;
                const char* from = shared_pointer(address);
                if (copy.add) {
                    from_float(element, to_float(element, global) + to_float(element, from), global);
                } else {
                    std::memcpy(global, from, size);
                }
            });
            end_read_shared(copy.shared, static_cast<uint32_t>(copy.bytes));
        }
        mine.groups.pop_front();
    }
    (void)where;
}

void end_read_shared(uint32_t address, uint32_t bytes) {
    Warp& w = warp();
    const uint32_t begin = address - kSharedBase;
    for (uint32_t offset = begin; offset < begin + bytes; offset += kCell) {
        Cell& cell = shared_cell(*w.block, offset);
        --cell.in_flight;
        cell.readers |= static_cast<uint16_t>(1u << w.index);
        cell.read_clock[w.index] = static_cast<uint16_t>(w.clock.at[w.index]);
    }
    w.dirty = true;
}

}  // namespace fastattn::cuda::emulation
