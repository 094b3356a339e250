// The CUDA entry points. The stream is a cudaStream_t; no CUDA header here, so that any C++ compiler can include it.
#pragma once

#include <cstddef>
#include <string>

#include "params.h"

namespace fastattn::cuda {

// Why there is no kernel for a call on e4m3 tensors; empty where there is one. Strides are looked at where q has data.
std::string e4m3_reason(const AttentionParams& params);

// Which kernel and tiles a call gets, in words, for layouts that are read in chunks of 16 bytes.
std::string configuration(const AttentionParams& params, bool backward);

// Bytes of params.workspace, on the device, that the calls need; whatever the strides. Looks at params.device.
size_t forward_workspace_bytes(const AttentionParams& params);
size_t backward_workspace_bytes(const AttentionParams& params);

// Launch on the given stream of params.device and return; std::runtime_error where CUDA reports an error. The first
// call of a kernel on a device may set its limit of shared memory, which a stream capture permits.
void attention_forward(const AttentionParams& params, void* stream);
void attention_backward(const AttentionParams& params, void* stream);

}  // namespace fastattn::cuda
