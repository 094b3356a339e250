// Host side of the Hopper kernels: which calls they take, and how.
#pragma once

#include <string>

#include "params.h"

namespace fastattn::cuda::sm90 {

// Why a call is left to the sm_80 kernels; empty where it is not. Strides are looked at where q has data.
std::string forward_reason(const AttentionParams& params);
std::string backward_reason(const AttentionParams& params);

// The kernel and its tiles in words, for a call without a reason.
std::string configuration(const AttentionParams& params, bool backward);

// The row of the table in tiles.h: by the band, or as FASTATTN_SM90_VARIANT asks.
int forward_variant(const AttentionParams& params);

// Bytes of params.workspace that the forward needs, for a call without a reason.
int64_t forward_workspace_bytes(const AttentionParams& params);

// Bytes of params.workspace that the backward needs.
int64_t backward_workspace_bytes(const AttentionParams& params);

// The device of params is current.
void attention_forward(const AttentionParams& params, void* stream);
void attention_backward(const AttentionParams& params, void* stream);

}  // namespace fastattn::cuda::sm90
