// What the translation units of the sm_80 kernels define, once per element type and bucket of head dimensions.
#pragma once

#include "cuda/ptx/convert.h"
#include "params.h"

namespace fastattn::cuda::sm80 {

// T: Half or BFloat16. kHeadDim holds head_dim_qk and head_dim_v.

// kHeadDim: 32, 64, 96, 128, 192, 256. Windows and packed sequences alone; softmax_scale > 0, q, k, v and out in chunks
// of 16 bytes.
template <typename T, int kHeadDim>
void forward(const AttentionParams& params, void* stream);

// kHeadDim: 64, 128, 256. Everything. With num_splits > 1 workspace holds what the splits leave to be combined.
template <typename T, int kHeadDim>
void forward_general(const AttentionParams& params, void* stream);

// The backward: prepare, dkdv, and then dq if params.deterministic, else convert_dq. workspace: backward.h.
// kGeneral: as for forward; kHeadDim is then 64, 128 or 256.
template <typename T>
void prepare(const AttentionParams& params, void* stream);
template <typename T, int kHeadDim, bool kGeneral>
void dkdv(const AttentionParams& params, void* stream);
template <typename T, int kHeadDim, bool kGeneral>
void dq(const AttentionParams& params, void* stream);
template <typename T>
void convert_dq(const AttentionParams& params, void* stream);

}  // namespace fastattn::cuda::sm80
