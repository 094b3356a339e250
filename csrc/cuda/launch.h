// Launching from the host: every return code becomes an exception, the caller's device is restored.
#pragma once

#include <cuda_runtime_api.h>

#include "check.h"
#include "params.h"

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

// Launches a kernel that takes AttentionParams by value on a one-dimensional grid. Capturable in a CUDA graph.
inline void launch(void (*kernel)(AttentionParams), int64_t blocks, int threads, const AttentionParams& params,
                   void* stream) {
    if (blocks == 0) return;
    check(blocks <= 0x7fffffff, "a grid of ", blocks, " blocks: CUDA takes at most 2^31 - 1");
    void* arguments[] = {const_cast<AttentionParams*>(&params)};
    check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                dim3(static_cast<unsigned>(threads)), arguments, 0, static_cast<cudaStream_t>(stream)),
               "cudaLaunchKernel");
}

}  // namespace fastattn::cuda
