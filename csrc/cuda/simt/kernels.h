// What the translation units of the SIMT kernels define, once per element type and bucket of head dimensions.
#pragma once

#include "cuda/ptx/convert.h"
#include "params.h"

namespace fastattn::cuda::simt {

// T: float. kHeadDim: 64, 128 or 256; head_dim_v is at most that.
template <typename T, int kHeadDim>
void forward(const AttentionParams& params, void* stream);

// head_dim_qk and head_dim_v are at most kHeadDim. workspace: delta (batches_q, heads_q, rows_q) float, see band.h.
template <typename T, int kHeadDim>
void backward(const AttentionParams& params, void* stream);

// T: Half, BFloat16 or float; any head_dim. workspace: as backward leaves it. params.dbias is wanted.
template <typename T>
void dbias(const AttentionParams& params, void* stream);

}  // namespace fastattn::cuda::simt
