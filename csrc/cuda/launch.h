// Launching from the host: every return code becomes an exception, the caller's device is restored.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "check.h"

namespace fastattn::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
    check(error == cudaSuccess, what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Makes a device current for a scope.
class DeviceGuard {
public:
    explicit DeviceGuard(int64_t device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        switched_ = previous_ != device;
        if (switched_) check_cuda(cudaSetDevice(static_cast<int>(device)), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (switched_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool switched_ = false;
};

inline int64_t multiprocessors(int64_t device) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, static_cast<int>(device)),
               "cudaDeviceGetAttribute");
    return count;
}

// 90 for 9.0.
inline int64_t compute_capability(int64_t device) {
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, static_cast<int>(device)),
               "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, static_cast<int>(device)),
               "cudaDeviceGetAttribute");
    return 10 * major + minor;
}

struct Grid {
    int64_t x, y = 1, z = 1;
};

// Shared memory that a kernel may have without asking for more.
constexpr int kDefaultSharedBytes = 48 << 10;

// Launches kernel(arguments...) with so many bytes of dynamic shared memory. Capturable in a CUDA graph.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* stream,
            const Arguments&... arguments) {
    static_assert((std::is_same_v<Parameters, Arguments> && ...), "arguments must have the kernel's own types");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    check(grid.x <= 0x7fffffff && grid.y <= 0xffff && grid.z <= 0xffff, "a grid of ", grid.x, " x ", grid.y, " x ",
          grid.z, " blocks: CUDA takes at most (2^31 - 1) x 65535 x 65535");
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > kDefaultSharedBytes) {
        check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
                   "cudaFuncSetAttribute");
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    void* pointers[] = {const_cast<Arguments*>(&arguments)...};
    check_cuda(cudaLaunchKernel(function, blocks, dim3(static_cast<unsigned>(threads)), pointers,
                                static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
               "cudaLaunchKernel");
}

}  // namespace fastattn::cuda
