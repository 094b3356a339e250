// What the emulated Hopper wrappers call, and the state behind it.
#pragma once

#include "emulator/api.h"

namespace fastattn::cuda::emulation {

enum class Element : uint8_t { kFloat16, kBFloat16, kFloat32, kE4M3 };  // no tensor map of kE4M3

struct TensorMap {
    char* base = nullptr;
    Element element = Element::kFloat16;
    int rank = 0;
    int64_t dim[5] = {1, 1, 1, 1, 1}, stride[5] = {};  // strides in bytes
    int box[5] = {1, 1, 1, 1, 1};
    int swizzle_bytes = 0;  // 0, 32, 64, 128

    int element_bytes() const { return element == Element::kFloat32 ? 4 : 2; }
    int bytes() const { return element_bytes() * box[0] * box[1] * box[2] * box[3] * box[4]; }
};

void mbarrier_init(uint32_t address, int count, Where where);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t address, int expected_bytes, Where where);
bool mbarrier_try_wait(uint32_t address, int parity, Where where);
void mbarrier_wait(uint32_t address, int parity, Where where);
void fence_proxy_async();

[[noreturn]] void fail_rank(int rank, int dimensions, Where where);
void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, const int (&at)[5], Where where);
void tma_store(const TensorMap& map, uint32_t shared, const int (&at)[5], bool add, Where where);
void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t mbarrier, Where where);
void bulk_store(void* global, uint32_t shared, int bytes, bool add, Where where);
void bulk_commit(Where where);
void bulk_wait(int pending, bool read_only, Where where);

void stmatrix(uint32_t address, const uint32_t* registers, int count, bool transposed, Where where);

// n accumulators a lane; a: null for an operand in shared memory.
struct WgmmaArguments {
    float* d;
    int n;
    const uint32_t* a;
    uint64_t a_descriptor, b_descriptor;
    Element element;
    bool transpose_a, transpose_b, accumulate;
};
void wgmma(const WgmmaArguments& arguments, Where where);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
void wgmma_wait(int pending, Where where);
void setmaxnreg(int registers, bool increase, Where where);

}  // namespace fastattn::cuda::emulation
