// Shared memory: bounds, alignment, races, what was never written, what has not arrived.
//
// Warps are ordered by vector clocks, which barriers and mbarriers join; the lanes of a warp by the count of warp-wide
// barriers. A collective such as ldmatrix reads for all lanes at one moment.
#include "emulator/machine.h"

namespace fastattn::cuda::emulation {
namespace {

const char* pending_name(uint8_t pending) { return pending == kCpAsync ? "a cp.async" : "a bulk copy"; }

[[noreturn]] void race(const Access& access, uint32_t offset, const char* other, int agent, int line) {
    if (agent < block().warps) {
        fail(access.where, "race: %s of shared memory + 0x%x is not ordered after the %s by warp %d at line %d",
             access.what, offset, other, agent, line);
    }
    fail(access.where,
         "race: %s of shared memory + 0x%x without having waited for the mbarrier of the bulk copy at line %d",
         access.what, offset, line);
}

bool proxy_fenced(const Cell& cell) {
    const Warp& writer = *block().warp[cell.writer];
    return writer.lane[cell.writer_lane].proxy_fences > cell.write_fences ||
           warp().proxy_fence.at[cell.writer] >= cell.write_clock;
}

void check_after_write(const Cell& cell, uint32_t offset, const Access& access) {
    const Warp& w = warp();
    if (w.clock.at[cell.writer] < cell.write_clock) race(access, offset, "write", cell.writer, cell.write_line);
    if (cell.writer == w.index && cell.write_sync == w.sync && cell.writer_lane != access.lane) {
        fail(access.where,
             "race: %s of shared memory + 0x%x, written by lane %d at line %d with no warp_barrier() between",
             access.what, offset, cell.writer_lane, cell.write_line);
    }
    if (access.async_proxy && cell.generic && !proxy_fenced(cell)) {
        fail(access.where,
             "missing proxy fence: %s of shared memory + 0x%x through the async proxy, written by warp %d lane %d at "
             "line "
             "%d through the generic proxy without a fence_proxy_async() after it",
             access.what, offset, cell.writer, cell.writer_lane, cell.write_line);
    }
}

void read_cell(Cell& cell, uint32_t offset, const Access& access) {
    Warp& w = warp();
    const uint16_t bit = static_cast<uint16_t>(1u << w.index), clock = static_cast<uint16_t>(w.clock.at[w.index]);
    if (cell.generation != w.block->generation || (cell.writer == kNobody && !cell.pending)) {
        fail(access.where, "%s of shared memory + 0x%x, which nothing has written", access.what, offset);
    }
    if (cell.pending) {
        fail(access.where, "%s of shared memory + 0x%x while %s into it (line %d) has not been waited for", access.what,
             offset, pending_name(cell.pending), cell.write_line);
    }
    const bool seen = (cell.readers & bit) && cell.read_clock[w.index] == clock && cell.reader == w.index &&
                      cell.reader_lane == access.lane && !access.in_flight;
    if (seen) return;
    check_after_write(cell, offset, access);
    const bool several =
        cell.reader == w.index && cell.read_sync == w.sync && cell.readers && cell.reader_lane != access.lane;
    cell.reader_lane = several ? kSeveralLanes : access.lane;
    cell.reader = static_cast<uint8_t>(w.index);
    cell.readers |= bit;
    cell.read_clock[w.index] = clock;
    cell.read_line = static_cast<uint16_t>(access.where.line);
    cell.read_sync = w.sync;
    if (access.in_flight && ++cell.in_flight == 0) fail(access.where, "more than 255 asynchronous reads in flight");
}

void write_cell(Cell& cell, uint32_t offset, const Access& access) {
    Warp& w = warp();
    if (cell.generation != w.block->generation) {
        cell = Cell{};
        cell.generation = w.block->generation;
        cell.writer = kNobody;
    }
    if (cell.pending) {
        fail(access.where, "%s to shared memory + 0x%x while %s into it (line %d) has not been waited for", access.what,
             offset, pending_name(cell.pending), cell.write_line);
    }
    if (cell.in_flight) {
        fail(access.where,
             "%s to shared memory + 0x%x while an asynchronous read of it (line %d) has not been waited for",
             access.what, offset, cell.read_line);
    }
    if (cell.writer != kNobody && (cell.writer != w.index || cell.write_sync != w.sync || access.async_proxy)) {
        // Two lanes of a warp may write the halves of one word.
        check_after_write(cell, offset, access);
    }
    for (uint32_t left = cell.readers; left; left &= left - 1) {
        const int reader = __builtin_ctz(left);
        if (w.clock.at[reader] < cell.read_clock[reader]) race(access, offset, "read", reader, cell.read_line);
    }
    if (cell.readers && cell.reader == w.index && cell.read_sync == w.sync && cell.reader_lane != kAllLanes &&
        cell.reader_lane != access.lane) {
        fail(access.where,
             "race: %s to shared memory + 0x%x, read by another lane at line %d with no warp_barrier() between",
             access.what, offset, cell.read_line);
    }
    cell.writer = static_cast<uint8_t>(w.index);
    cell.writer_lane = access.lane;
    cell.write_clock = static_cast<uint16_t>(w.clock.at[w.index]);
    cell.write_line = static_cast<uint16_t>(access.where.line);
    cell.write_sync = w.sync;
    cell.write_fences = current->proxy_fences;
    cell.generic = access.pending != kTma;
    cell.pending = access.pending;
    cell.readers = 0;
}

// Four-byte banks: the distinct words of a bank are served one after another, and 8 or 16 bytes a lane in 2 or 4 goes.
void count_banks(uint32_t address, uint32_t bytes, Where where) {
    Warp& w = warp();
    auto& sites = w.banks[{where.line, static_cast<int>(bytes)}];
    const uint32_t bit = 1u << current->index;
    size_t n = 0;
    while (n < sites.size() && (sites[n].lanes & bit)) ++n;
    if (n == sites.size()) sites.emplace_back();
    BankSite& site = sites[n];
    site.lanes |= bit;
    site.address[current->index] = address;
    if (site.lanes != w.all) return;
    const int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    for (int first = 0; first < kWarp; first += group) {
        std::map<uint32_t, std::vector<uint32_t>> words;
        size_t most = 1;
        for (int l = first; l < first + group && (w.all >> l & 1); ++l) {
            for (uint32_t word = site.address[l] / 4; word < (site.address[l] + bytes + 3) / 4; ++word) {
                auto& bank = words[word % 32];
                bool known = false;
                for (uint32_t other : bank) known = known || other == word;
                if (!known) bank.push_back(word);
                most = std::max(most, bank.size());
            }
        }
        ++statistics.shared_accesses;
        statistics.shared_conflicts += most - 1;
    }
    sites.erase(sites.begin() + static_cast<long>(n));
}

}  // namespace

char* shared_pointer(uint32_t address) { return block().shared + (address - kSharedBase); }
Cell& shared_cell(Block& b, uint32_t offset) { return b.cells[offset / kCell]; }

void check_shared(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, Where where) {
    const uint32_t size = static_cast<uint32_t>(machine->shared_bytes);
    if (address < kSharedBase || address - kSharedBase + bytes > size) {
        fail(where, "%s: bytes %lld to %lld of the block's %u bytes of shared memory", what,
             static_cast<long long>(address) - kSharedBase, static_cast<long long>(address) - kSharedBase + bytes,
             size);
    }
    if (address % alignment) {
        fail(where, "%s: shared memory + 0x%x is not a multiple of %u bytes", what, address - kSharedBase, alignment);
    }
}

void read_shared(uint32_t address, uint32_t bytes, const Access& access) {
    const uint32_t begin = address - kSharedBase;
    Cell* cells = block().cells.data();
    for (uint32_t n = begin / kCell; n < (begin + bytes + kCell - 1) / kCell; ++n)
        read_cell(cells[n], n * kCell, access);
    warp().dirty = true;
}

void write_shared(uint32_t address, uint32_t bytes, const Access& access) {
    const uint32_t begin = address - kSharedBase;
    Cell* cells = block().cells.data();
    for (uint32_t n = begin / kCell; n < (begin + bytes + kCell - 1) / kCell; ++n)
        write_cell(cells[n], n * kCell, access);
    warp().dirty = true;
}

void land_shared(uint32_t address, uint32_t bytes) {
    const Warp& w = warp();
    const uint32_t begin = address - kSharedBase;
    for (uint32_t n = begin / kCell; n < (begin + bytes) / kCell; ++n) {
        Cell& cell = w.block->cells[n];
        cell.pending = kNone;
        cell.write_clock = static_cast<uint16_t>(w.clock.at[w.index]);
        cell.write_sync = w.sync;
        cell.write_fences = current->proxy_fences;
    }
    warp().dirty = true;
}

void load_shared(uint32_t address, void* to, uint32_t bytes, Where where) {
    check_shared(address, bytes, bytes, "load", where);
    read_shared(address, bytes, {"load", where, static_cast<uint8_t>(current->index)});
    if (options.banks) count_banks(address, bytes, where);
    std::memcpy(to, shared_pointer(address), bytes);
}

void store_shared(uint32_t address, const void* from, uint32_t bytes, Where where) {
    check_shared(address, bytes, bytes, "store", where);
    write_shared(address, bytes, {"store", where, static_cast<uint8_t>(current->index)});
    if (options.banks) count_banks(address, bytes, where);
    std::memcpy(shared_pointer(address), from, bytes);
}

}  // namespace fastattn::cuda::emulation
