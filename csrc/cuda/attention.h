// The CUDA entry points. The stream is a cudaStream_t; no CUDA header here, so that any C++ compiler can include it.
#pragma once

#include <cstddef>

#include "params.h"

namespace fastattn::cuda {

// Bytes of params.workspace, on the device, that attention_backward needs.
size_t backward_workspace_bytes(const AttentionParams& params);

// Launch on the given stream of params.device and return; std::runtime_error where CUDA reports an error.
void attention_forward(const AttentionParams& params, void* stream);
void attention_backward(const AttentionParams& params, void* stream);

}  // namespace fastattn::cuda
