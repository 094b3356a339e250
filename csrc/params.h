// One attention call as the kernels see it: fastattn.spec.AttentionSpec plus pointers and strides. No torch here.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

// A tensor of four dimensions in any strides, counted in elements; a broadcast dimension has stride 0.
// For lse and the like, which have three dimensions, stride[3] is unused.
struct Tensor4 {
    void* data;
    int64_t stride[4];
};

struct AttentionParams {
    DType dtype;       // of q, k, v, out and their gradients
    DType bias_dtype;  // of bias and dbias

    int64_t batch;
    int64_t heads_q;
    int64_t heads_k;  // query head h reads key head h / (heads_q / heads_k)
    int64_t seqlen_q;
    int64_t seqlen_k;
    int64_t head_dim_qk;
    int64_t head_dim_v;

    double softmax_scale;

    // Key j is visible to query i iff i + offset - left <= j <= i + offset + right (2^40: unbounded).
    int64_t left;
    int64_t right;
    int64_t offset;

    // Philox4x32-10 with key (seed low, seed high) and counter (j / 4, i, (b*heads_q + h) low, high);
    // word j % 4 drops the entry iff word < dropout_threshold = floor(dropout_p * 2^32).
    uint64_t dropout_threshold;   // 0: no dropout; 2^32: everything dropped
    const int64_t* dropout_seed;  // one element, on the device
    double dropout_scale;         // 1 / (1 - dropout_p), 0 when dropout_p = 1

    Tensor4 q;     // (batch, heads_q, seqlen_q, head_dim_qk)
    Tensor4 k;     // (batch, heads_k, seqlen_k, head_dim_qk)
    Tensor4 v;     // (batch, heads_k, seqlen_k, head_dim_v)
    Tensor4 mask;  // (batch, heads_q, seqlen_q, seqlen_k) bool, true = visible; null data: none
    Tensor4 bias;  // (batch, heads_q, seqlen_q, seqlen_k) of bias_dtype; null data: none
    Tensor4 out;   // (batch, heads_q, seqlen_q, head_dim_v)
    Tensor4 lse;   // (batch, heads_q, seqlen_q) float, double for double inputs; natural log, -inf: sees nothing

    // Backward only.
    Tensor4 grad_out;       // like out
    Tensor4 grad_lse;       // like lse; null data: none
    Tensor4 dq;             // like q
    Tensor4 dk;             // like k
    Tensor4 dv;             // like v
    Tensor4 dbias;          // bias_dtype, shape bias_shape; null data: not wanted
    int64_t bias_shape[4];  // of bias before broadcasting: dbias is summed over the dimensions of size 1

    bool deterministic;   // CUDA backward: every sum in one order, no atomics
    int64_t num_splits;   // CUDA forward: parts into which the keys are divided, at least 1
    void* workspace;      // scratch memory on the device, as much as the entry point says
    int64_t device;       // CUDA device index; unused on the CPU
    int64_t num_threads;  // CPU only
};

}  // namespace fastattn
