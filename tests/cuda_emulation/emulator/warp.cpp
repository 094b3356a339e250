// What the lanes of a warp do together, and cp.async.
#include <cmath>

#include "emulator/convert.h"
#include "emulator/machine.h"

namespace fastattn::cuda::emulation {

void warp_barrier(Where where) {
    collective("warp_barrier", 0, nullptr, where, [](void**) { ++warp().sync; });
}

namespace {

struct Exchange {
    uint32_t in, out;
    int lane;
};

uint32_t exchange(const char* what, uint32_t value, int lane, Where where) {
    Exchange mine{value, 0, lane};
    if (lane < 0 || lane >= kWarp) fail(where, "%s: lane %d", what, lane);
    collective(what, 0, &mine, where, [&](void** lanes) {
        for (int l = 0; l < kWarp; ++l) {
            if (!(warp().all >> l & 1)) continue;
            Exchange& x = *static_cast<Exchange*>(lanes[l]);
            if (!(warp().all >> x.lane & 1))
                fail(where, "%s: from lane %d, which the warp does not have", what, x.lane);
            x.out = static_cast<Exchange*>(lanes[x.lane])->in;
        }
    });
    return mine.out;
}

}  // namespace

uint32_t shuffle_xor(uint32_t value, int mask, Where where) {
    return exchange("shfl.xor", value, current->index ^ mask, where);
}
uint32_t shuffle(uint32_t value, int lane, Where where) { return exchange("shfl.idx", value, lane, where); }

uint32_t ballot(bool condition, Where where) {
    Exchange mine{condition, 0, 0};
    collective("vote", 0, &mine, where, [&](void** lanes) {
        uint32_t votes = 0;
        for (int l = 0; l < kWarp; ++l) {
            if (warp().all >> l & 1) votes |= static_cast<Exchange*>(lanes[l])->in << l;
        }
        for (int l = 0; l < kWarp; ++l) {
            if (warp().all >> l & 1) static_cast<Exchange*>(lanes[l])->out = votes;
        }
    });
    return mine.out;
}

namespace {

// The lanes of a warp at one instruction of the tensor core, of which all 32 must be there.
void check_full(const char* what, Where where) {
    if (warp().all != ~0u) fail(where, "%s: in a warp of fewer than 32 lanes", what);
}

struct MatrixRow {
    uint32_t* registers;
    uint32_t address;
};

}  // namespace

void ldmatrix(uint32_t* registers, int count, bool transposed, uint32_t address, Where where) {
    check_full("ldmatrix", where);
    MatrixRow mine{registers, address};
    const uint64_t operand = static_cast<uint64_t>(count) << 1 | transposed;
    collective("ldmatrix", operand, &mine, where, [&](void** lanes) {
        uint16_t matrix[4][8][8];
        ++statistics.ldmatrix;
        for (int l = 0; l < 8 * count; ++l) {
            const uint32_t row = static_cast<MatrixRow*>(lanes[l])->address;
            check_shared(row, 16, 16, "ldmatrix", where);
            read_shared(row, 16, {"ldmatrix", where, kAllLanes});
            std::memcpy(matrix[l / 8][l % 8], shared_pointer(row), 16);
        }
        for (int m = 0; m < count; ++m) {  // the 8 rows of a matrix come in one go if they lie in different banks
            uint32_t banks = 0;
            for (int r = 0; r < 8; ++r) {
                const uint32_t bit = 1u << static_cast<MatrixRow*>(lanes[8 * m + r])->address / 16 % 8;
                statistics.ldmatrix_conflicts += (banks & bit) != 0;
                banks |= bit;
            }
        }
        for (int l = 0; l < kWarp; ++l) {
            for (int m = 0; m < count; ++m) {
                const int g = l / 4, t = l % 4 * 2;
                const uint16_t low = transposed ? matrix[m][t][g] : matrix[m][g][t];
                const uint16_t high = transposed ? matrix[m][t + 1][g] : matrix[m][g][t + 1];
                static_cast<MatrixRow*>(lanes[l])->registers[m] = low | static_cast<uint32_t>(high) << 16;
            }
        }
    });
}

namespace {

struct Mma {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

template <bool kBFloat16>
float element(uint32_t packed, int half) {
    const auto bits = static_cast<uint16_t>(packed >> (16 * half));
    return kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

template <bool kBFloat16>
void multiply(void** lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < kWarp; ++l) {
        const Mma& x = *static_cast<Mma*>(lanes[l]);
        const int g = l / 4, t = l % 4 * 2;
        for (int half = 0; half < 2; ++half) {
            for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + half + r / 2 * 8] = element<kBFloat16>(x.a[r], half);
            for (int r = 0; r < 2; ++r) b[t + half + r * 8][g] = element<kBFloat16>(x.b[r], half);
        }
        for (int r = 0; r < 4; ++r) d[g + r / 2 * 8][t + r % 2] = x.d[r];
    }
    for (int i = 0; i < 16; ++i) {
        for (int k = 0; k < 16; ++k) {
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
        }
    }
    for (int l = 0; l < kWarp; ++l) {
        const int g = l / 4, t = l % 4 * 2;
        for (int r = 0; r < 4; ++r) static_cast<Mma*>(lanes[l])->d[r] = d[g + r / 2 * 8][t + r % 2];
    }
}

}  // namespace

void mma_m16n8k16(bool bfloat16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Where where) {
    check_full("mma", where);
    Mma mine{d, a, {b0, b1}};
    collective("mma", bfloat16, &mine, where, [&](void** lanes) {
        ++statistics.mma;
        bfloat16 ? multiply<true>(lanes) : multiply<false>(lanes);
    });
}

// A copy lands as late as the program allows: when the thread waits for it. Until then reading or writing there is an
// error.
void cp_async(uint32_t shared, const void* global, uint32_t bytes, bool valid, Where where) {
    ++statistics.cp_async;
    check_shared(shared, bytes, bytes, "cp.async", where);
    if (valid) {
        read_global(global, bytes, bytes, "cp.async", where);
    } else if (reinterpret_cast<uintptr_t>(global) % bytes) {
        fail(where, "cp.async: global address %p is not a multiple of %u bytes", global, bytes);
    }
    write_shared(shared, bytes, {"cp.async", where, static_cast<uint8_t>(current->index), false, false, kCpAsync});
    std::memset(shared_pointer(shared), 0xff, bytes);
    current->open_copies.push_back({shared, bytes, global, valid, where.line});
}

void cp_async_commit(Where) {
    current->copy_groups.push_back(std::move(current->open_copies));
    current->open_copies.clear();
}

void cp_async_wait(int pending, Where) {
    auto& groups = current->copy_groups;
    while (groups.size() > static_cast<size_t>(pending)) {
        for (const Copy& copy : groups.front()) {
            if (copy.valid) {
                std::memcpy(shared_pointer(copy.shared), copy.global, copy.bytes);
            } else {
                std::memset(shared_pointer(copy.shared), 0, copy.bytes);
            }
            land_shared(copy.shared, copy.bytes);
        }
        groups.pop_front();
    }
}

}  // namespace fastattn::cuda::emulation
