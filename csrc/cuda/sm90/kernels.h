// What the translation units of the Hopper kernels define, once per element type and head dimension.
#pragma once

#include <cstddef>

#include "cuda/ptx/convert.h"
#include "params.h"

namespace fastattn::cuda::sm90 {

// T: Half or BFloat16. kHeadDim: 64, 96, 128, 192 or 256, which holds head_dim_qk and head_dim_v (192: at most 128).
// What is asked of tensors: cuda/sm90/dispatch.cu. variant: a row of the table in tiles.h.
template <typename T, int kHeadDim>
void forward(const AttentionParams& params, int variant, int multiprocessors, void* stream);

// e4m3. kHeadDim: 64, 128 or 256. workspace: forward_fp8.h.
template <int kHeadDim>
void forward_fp8(const AttentionParams& params, int variant, int multiprocessors, void* stream);

// kHeadDim: 64, 128 or 256. num_splits is set, workspace: decode.h.
template <typename T, int kHeadDim>
void decode(const AttentionParams& params, void* stream);

// kHeadDim: 64, 128, 192 or 256, as forward's. The backward: sm80::prepare (params.deterministic: no sums for dQ are
// cleared), clear_dq_sums, dkdv, convert_dq; deterministic: sm80::prepare, dkdv, dq. workspace: gradient_sums.h.
template <typename T, int kHeadDim>
void clear_dq_sums(const AttentionParams& params, void* stream);
template <typename T, int kHeadDim>
void dkdv(const AttentionParams& params, void* stream);
template <typename T, int kHeadDim>
void convert_dq(const AttentionParams& params, void* stream);
template <typename T, int kHeadDim>
void dq(const AttentionParams& params, void* stream);

}  // namespace fastattn::cuda::sm90
