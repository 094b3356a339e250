// What the emulated wrappers call. docs/cuda-emulation.md says what is modelled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fastattn::cuda::emulation {

// The line of the kernel that an instruction stands on: the default argument of every wrapper.
struct Where {
    const char* file;
    int line;
    static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// Runs body in every thread of the grid; std::runtime_error tells the first thing that went wrong.
void launch(int64_t grid_x, int64_t grid_y, int64_t grid_z, int threads, int shared_bytes, std::function<void()> body);

constexpr uint32_t kSharedBase = 0x400;  // as on sm_90, where the system keeps the first KiB

int thread_index();
int64_t block_index(int axis);
int64_t grid_size();

void barrier(int id, int threads, bool wait, Where where);  // threads 0: all of the block
bool barrier_or(bool condition, Where where);
void warp_barrier(Where where);

uint32_t shuffle_xor(uint32_t value, int mask, Where where);
uint32_t shuffle(uint32_t value, int lane, Where where);
uint32_t ballot(bool condition, Where where);

void load_shared(uint32_t address, void* to, uint32_t bytes, Where where);
void store_shared(uint32_t address, const void* from, uint32_t bytes, Where where);
void load_global(const void* address, void* to, uint32_t bytes, bool constant, Where where);
void store_global(void* address, const void* from, uint32_t bytes, Where where);

enum class Order { kRelaxed, kAcquire, kRelease, kAcquireRelease };
void reduce_add(float* address, const float* values, int count, Where where);
int32_t atomic_add(int32_t* address, int32_t value, Order order, Where where);
int32_t load_acquire(const int32_t* address, Where where);
void store_release(int32_t* address, int32_t value, Where where);
void wait_until_equal(const int32_t* address, int32_t value, Where where);
void fence_gpu();

void cp_async(uint32_t shared, const void* global, uint32_t bytes, bool valid, Where where);
void cp_async_commit(Where where);
void cp_async_wait(int pending, Where where);

void ldmatrix(uint32_t* registers, int count, bool transposed, uint32_t address, Where where);
void mma_m16n8k16(bool bfloat16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Where where);

}  // namespace fastattn::cuda::emulation
