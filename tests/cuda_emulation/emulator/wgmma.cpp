// wgmma, stmatrix, setmaxnreg. A wgmma is computed when its warp waits for it; until then accumulators hold poison,
// and operands in shared memory count as being read.
#include "emulator/bulk.h"
#include "emulator/convert.h"

namespace fastattn::cuda::emulation {
namespace {

// Signalling NaN, which any arithmetic changes; or, as kernels may compute anew what has become NaN, 3e5: far from any
// result, and not so large that adding 1 would change nothing.
uint32_t poison() { return options.seed % 2 ? 0x48927c5e : 0xffa5a5a5; }

// The true accumulators of a warp while wgmmas write them.
struct Accumulators {
    float* registers[kWarp];
    int count;  // of a lane
    std::vector<float> value;
    int users = 0;
};

struct Operation {
    WgmmaArguments arguments;
    std::shared_ptr<Accumulators> accumulators;
    const uint32_t* a[kWarp];
    uint32_t a_value[kWarp][4];
    uint64_t index;
    int line;
};

}  // namespace

struct Wgmma {
    std::vector<Operation> open;
    std::deque<std::vector<Operation>> groups;
    std::vector<std::shared_ptr<Accumulators>> in_flight;
    bool fenced = false;
    uint64_t issued = 0;
};

namespace {

Wgmma& state(Warp& w) {
    if (!w.wgmma) w.wgmma = new Wgmma;
    return *w.wgmma;
}

// Matrix descriptors: fields in units of 16 bytes.
uint32_t field(uint64_t descriptor, int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; }
uint32_t row_bytes(uint64_t descriptor) {
    constexpr uint32_t kBytes[] = {16, 128, 64, 32};
    return kBytes[descriptor >> 62];
}
uint32_t swizzled(uint32_t address, uint32_t row) { return address ^ ((address >> 3) & (row - 16)); }

// The 16 bytes that hold elements k .. k + 7 of row mn (rows along K).
uint32_t chunk_along_k(uint64_t d, uint32_t mn, uint32_t k) {
    const uint32_t row = row_bytes(d);
    const uint32_t step = row == 16 ? k / 8 * field(d, 16) : k / 8 * 16;
    return swizzled(field(d, 0) + mn % 8 * row + mn / 8 * field(d, 32) + step, row);
}

// The 16 bytes that hold elements mn .. mn + 7 of row k (rows along M or N).
uint32_t chunk_along_mn(uint64_t d, uint32_t mn, uint32_t k) {
    const uint32_t row = row_bytes(d), per_row = row / 16, c = mn / 8;
    const uint32_t across = field(d, row == 16 ? 32 : 16), down = field(d, row == 16 ? 16 : 32);
    return swizzled(field(d, 0) + k % 8 * row + c % per_row * 16 + c / per_row * across + k / 8 * down, row);
}

// f(address, mn, k) for each chunk of a size x 16 operand, or size x 32 of e4m3, of which k counts pairs.
template <typename F>
void each_chunk(uint64_t descriptor, uint32_t size, bool transposed, F f) {
    if (transposed) {
        for (uint32_t mn = 0; mn < size; mn += 8) {
            for (uint32_t k = 0; k < 16; ++k) f(chunk_along_mn(descriptor, mn, k), mn, k);
        }
    } else {
        for (uint32_t mn = 0; mn < size; ++mn) {
            for (uint32_t k = 0; k < 16; k += 8) f(chunk_along_k(descriptor, mn, k), mn, k);
        }
    }
}

void begin_operand(uint64_t d, uint32_t size, bool transposed, const char* what, Where where) {
    if (d & 0x3ffec000c000c000ull)
        fail(where, "%s: descriptor %llx has a base offset or reserved bits", what, static_cast<unsigned long long>(d));
    each_chunk(d, size, transposed, [&](uint32_t address, uint32_t, uint32_t) {
        check_shared(address, 16, 16, what, where);
        read_shared(address, 16, {what, where, kAllLanes, true, true});
    });
}

// Elements of a register.
int packed(Element element) { return element == Element::kE4M3 ? 4 : 2; }

float unpack(Element element, uint32_t word, int n) {
    if (element == Element::kE4M3) return e4m3_to_float(static_cast<uint8_t>(word >> (8 * n)));
    const auto bits = static_cast<uint16_t>(word >> (16 * n));
    return element == Element::kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

// f(n, element) for those of the 16 bytes at address, which are no longer being read then.
template <typename F>
void take_chunk(Element element, uint32_t address, F f) {
    uint32_t words[4];
    std::memcpy(words, shared_pointer(address), 16);
    end_read_shared(address, 16);
    const int each = packed(element);
    for (int n = 0; n < 4 * each; ++n) f(n, unpack(element, words[n / each], n % each));
}

void issue(void** lanes, Where where) {
    Warp& w = warp();
    Wgmma& s = state(w);
    const WgmmaArguments& first = *static_cast<WgmmaArguments*>(lanes[0]);
    for (int l = 1; l < kWarp; ++l) {
        const WgmmaArguments& x = *static_cast<WgmmaArguments*>(lanes[l]);
        if (x.b_descriptor != first.b_descriptor || (!x.a && x.a_descriptor != first.a_descriptor) ||
            x.accumulate != first.accumulate) {
            fail(where, "wgmma: lanes 0 and %d differ in descriptors or accumulate", l);
        }
    }
    if (w.block->threads % 128) fail(where, "wgmma: in a block of %d threads, no whole warpgroups", w.block->threads);
    if (first.element == Element::kE4M3 && (first.transpose_a || first.transpose_b)) {
        fail(where, "wgmma: operands of e4m3 have rows along K");
    }
    if (!s.fenced) fail(where, "wgmma: no wgmma_fence() since registers could last be touched");
    auto& log = hopper(*w.block).issued[static_cast<size_t>(w.index / 4)];
    const uint64_t flags = static_cast<uint64_t>(first.n) | uint64_t{first.transpose_a} << 32 |
                           uint64_t{first.transpose_b} << 33 | uint64_t{first.accumulate} << 34 |
                           uint64_t{!first.a} << 35;
    const std::array<uint64_t, 4> entry = {first.a ? 0 : first.a_descriptor, first.b_descriptor, flags,
                                           static_cast<uint64_t>(where.line)};
    if (s.issued == log.size()) {
        log.push_back(entry);
    } else if (log[s.issued] != entry) {
        fail(where, "wgmma: the warps of a warpgroup issue different ones");
    }

    Operation op{first, nullptr, {}, {}, s.issued++, where.line};
    for (const auto& known : s.in_flight) {
        if (known->registers[0] == first.d) op.accumulators = known;
    }
    if (!op.accumulators) {
        auto fresh = std::make_shared<Accumulators>();
        fresh->count = first.n / 2;
        fresh->value.resize(static_cast<size_t>(kWarp * fresh->count));
        for (int l = 0; l < kWarp; ++l) {
            fresh->registers[l] = static_cast<WgmmaArguments*>(lanes[l])->d;
            std::memcpy(&fresh->value[static_cast<size_t>(l * fresh->count)], fresh->registers[l], 4u * fresh->count);
            const uint32_t bits = poison();
            for (int n = 0; n < fresh->count; ++n) std::memcpy(&fresh->registers[l][n], &bits, 4);
        }
        s.in_flight.push_back(fresh);
        op.accumulators = fresh;
    }
    ++op.accumulators->users;
    if (first.a) {
        for (int l = 0; l < kWarp; ++l) {
            op.a[l] = static_cast<WgmmaArguments*>(lanes[l])->a;
            std::memcpy(op.a_value[l], op.a[l], 16);
        }
    } else {  // which warp reads which rows is not said: each all of them
        begin_operand(first.a_descriptor, 64, first.transpose_a, "wgmma A", where);
    }
    begin_operand(first.b_descriptor, static_cast<uint32_t>(first.n), first.transpose_b, "wgmma B", where);
    s.open.push_back(op);
    ++statistics.wgmma;
    for (int n = w.index / 4 * 4; n < w.index / 4 * 4 + 4; ++n) {  // the others may wait for this warp
        Warp& other = *w.block->warp[static_cast<size_t>(n)];
        for (Lane& lane : other.lane) {
            if (lane.waits && !std::strcmp(lane.waits, "wgmma of the warpgroup's other warps"))
                machine->make_ready(&lane);
        }
    }
}

void execute(Operation& op, Where where) {
    static float a[16][32], b[32][256], d[16][256];
    const WgmmaArguments& x = op.arguments;
    const int each = packed(x.element), depth = 8 * each;
    const uint32_t row0 = static_cast<uint32_t>(warp().index % 4 * 16);
    Accumulators& acc = *op.accumulators;
    if (x.a) {
        for (int l = 0; l < kWarp; ++l) {
            if (std::memcmp(op.a[l], op.a_value[l], 16)) {
                fail(where, "wgmma: the A fragment of lane %d, issued at line %d, was changed before the wait", l,
                     op.line);
            }
            for (int r = 0; r < 4; ++r) {
                for (int n = 0; n < each; ++n) {
                    a[l / 4 + r % 2 * 8][l % 4 * each + n + r / 2 * depth / 2] = unpack(x.element, op.a_value[l][r], n);
                }
            }
        }
    } else {
        each_chunk(x.a_descriptor, 64, x.transpose_a, [&](uint32_t address, uint32_t mn, uint32_t k) {
            const bool mine = row0 <= mn && mn < row0 + 16;
            take_chunk(x.element, address, [&](int n, float element) {
                if (mine) (x.transpose_a ? a[mn - row0 + n][k] : a[mn - row0][k * each / 2 + n]) = element;
            });
        });
    }
    each_chunk(x.b_descriptor, static_cast<uint32_t>(x.n), x.transpose_b,
               [&](uint32_t address, uint32_t mn, uint32_t k) {
                   take_chunk(x.element, address, [&](int n, float element) {
                       (x.transpose_b ? b[k][mn + n] : b[k * each / 2 + n][mn]) = element;
                   });
               });
    const auto at = [&](int l, int n) -> float& { return acc.value[static_cast<size_t>(l * acc.count + n)]; };
    for (int l = 0; l < kWarp; ++l) {
        for (int n = 0; n < acc.count; ++n) {
            d[l / 4 + n % 4 / 2 * 8][n / 4 * 8 + l % 4 * 2 + n % 2] = x.accumulate ? at(l, n) : 0.f;
        }
    }
    for (int i = 0; i < 16; ++i) {
        for (int k = 0; k < depth; ++k) {
            const float factor = a[i][k];
            for (int j = 0; j < x.n; ++j) d[i][j] += factor * b[k][j];
        }
    }
    for (int l = 0; l < kWarp; ++l) {
        for (int n = 0; n < acc.count; ++n) at(l, n) = d[l / 4 + n % 4 / 2 * 8][n / 4 * 8 + l % 4 * 2 + n % 2];
    }
    --acc.users;
}

void give_back(Accumulators& acc, Where where) {
    const uint32_t bits = poison();
    for (int l = 0; l < kWarp; ++l) {
        for (int n = 0; n < acc.count; ++n) {
            if (std::memcmp(&acc.registers[l][n], &bits, 4)) {
                fail(where, "wgmma: accumulator %d of lane %d was touched before the wait", n, l);
            }
        }
        std::memcpy(acc.registers[l], &acc.value[static_cast<size_t>(l * acc.count)], 4u * acc.count);
    }
}

}  // namespace

void wgmma(const WgmmaArguments& arguments, Where where) {
    WgmmaArguments mine = arguments;
    const uint64_t operand = static_cast<uint64_t>(mine.n) | uint64_t{mine.a != nullptr} << 16;
    collective("wgmma", operand, &mine, where, [&](void** lanes) { issue(lanes, where); });
}

void wgmma_fence(Where where) {
    collective("wgmma_fence", 0, nullptr, where, [](void**) { state(warp()).fenced = true; });
}

void wgmma_commit(Where where) {
    collective("wgmma_commit", 0, nullptr, where, [](void**) {
        Wgmma& s = state(warp());
        s.groups.push_back(std::move(s.open));
        s.open.clear();
    });
}

void wgmma_wait(int pending, Where where) {
    const Wgmma& s = state(warp());
    uint64_t needed = 0;
    for (size_t n = 0; n + static_cast<size_t>(pending) < s.groups.size(); ++n) {
        for (const Operation& op : s.groups[n]) needed = op.index + 1;
    }
    const auto all_issued = [&] {
        for (int n = warp().index / 4 * 4; n < warp().index / 4 * 4 + 4; ++n) {
            if (needed && state(*block().warp[static_cast<size_t>(n)]).issued < needed) return false;
        }
        return true;
    };
    while (!all_issued()) machine->block_on("wgmma of the warpgroup's other warps", 0, 0, where);
    collective("wgmma_wait", static_cast<uint64_t>(pending), nullptr, where, [&](void**) {
        Wgmma& mine = state(warp());
        while (mine.groups.size() > static_cast<size_t>(pending)) {
            for (Operation& op : mine.groups.front()) execute(op, where);
            mine.groups.pop_front();
            mine.fenced = false;
        }
        auto& flying = mine.in_flight;
        for (size_t n = 0; n < flying.size();) {
            if (flying[n]->users) {
                ++n;
                continue;
            }
            give_back(*flying[n], where);
            flying.erase(flying.begin() + static_cast<long>(n));
        }
    });
}

void finish_wgmma(Block& b) {
    for (auto& w : b.warp) {
        if (!w->wgmma) continue;
        if (!w->wgmma->groups.empty() || !w->wgmma->open.empty()) {
            bool any = !w->wgmma->open.empty();
            for (const auto& group : w->wgmma->groups) any = any || !group.empty();
            if (any) fail_block(b, "warp %d ends before it has waited for its wgmmas", w->index);
        }
        delete w->wgmma;
        w->wgmma = nullptr;
    }
}

void setmaxnreg(int registers, bool increase, Where where) {
    if (registers % 8 || registers < 24 || registers > 256) {
        fail(where, "setmaxnreg: %d registers, not a multiple of 8 in 24 .. 256", registers);
    }
    collective("setmaxnreg", static_cast<uint64_t>(registers), nullptr, where, [&](void**) {
        int& mine = warp().registers;
        if (increase ? registers < mine : registers > mine) {
            fail(where, "setmaxnreg: %s to %d, but the warp has %d", increase ? "increase" : "decrease", registers,
                 mine);
        }
        mine = registers;
    });
}

void stmatrix(uint32_t address, const uint32_t* registers, int count, bool transposed, Where where) {
    struct Row {
        const uint32_t* registers;
        uint32_t address;
    } mine{registers, address};
    const uint64_t operand = static_cast<uint64_t>(count) << 1 | transposed;
    collective("stmatrix", operand, &mine, where, [&](void** lanes) {
        uint16_t matrix[4][8][8];
        for (int l = 0; l < kWarp; ++l) {
            for (int m = 0; m < count; ++m) {
                for (int half = 0; half < 2; ++half) {
                    const int g = l / 4, t = l % 4 * 2 + half;
                    (transposed ? matrix[m][t][g] : matrix[m][g][t]) =
                        static_cast<uint16_t>(static_cast<Row*>(lanes[l])->registers[m] >> (16 * half));
                }
            }
        }
        for (int l = 0; l < 8 * count; ++l) {
            const uint32_t row = static_cast<Row*>(lanes[l])->address;
            check_shared(row, 16, 16, "stmatrix", where);
            // Which lane writes is not said; by convention the one that gives the address.
            write_shared(row, 16, {"stmatrix", where, static_cast<uint8_t>(l)});
            std::memcpy(shared_pointer(row), matrix[l / 8][l % 8], 16);
        }
    });
}

}  // namespace fastattn::cuda::emulation
