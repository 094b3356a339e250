// Host side of the Hopper forward on e4m3: which calls it takes, and how.
#pragma once

#include <string>

#include "params.h"

namespace fastattn::cuda::sm90 {

// Why there is no kernel for a call; empty where there is one. Strides are looked at where q has data.
std::string fp8_reason(const AttentionParams& params);

// The kernel and its tiles in words, for a call without a reason.
std::string fp8_configuration(const AttentionParams& params);

// Bytes of params.workspace.
int64_t fp8_workspace_bytes(const AttentionParams& params);

// The device of params is current.
void fp8_forward(const AttentionParams& params, void* stream);

}  // namespace fastattn::cuda::sm90
