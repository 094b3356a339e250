// One attention call as the kernels see it: fastattn.spec.AttentionSpec plus pointers and strides. No torch here.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3, kE4M3 = 4 };

// A tensor of four dimensions in any strides, counted in elements; a broadcast dimension has stride 0.
// For lse and the like, which have three dimensions, stride[3] is unused.
struct Tensor4 {
    void* data;
    int64_t stride[4];
};

// A tensor of one or two dimensions, strides in elements; a broadcast or missing dimension has stride 0.
template <typename T>
struct Table {
    const T* data;  // null: none
    int64_t stride[2];
};

struct AttentionParams {
    DType dtype;       // of q, k, v, out and their gradients; with kE4M3, out is of kBFloat16 and there are none
    DType bias_dtype;  // of bias and dbias

    int64_t batch;  // number of sequences
    int64_t heads_q;
    int64_t heads_k;   // query head h reads key head h / (heads_q / heads_k)
    int64_t seqlen_q;  // of the longest sequence when their lengths differ; i counts queries within a sequence
    int64_t seqlen_k;  // likewise; paged: what the block table has room for; j counts keys within a sequence
    int64_t head_dim_qk;
    int64_t head_dim_v;

    double softmax_scale;
    double softcap;  // 0: none; else scores are softcap * tanh(scores / softcap), before slopes and bias are added

    // Sequence b has m_b queries and n_b keys: m_b = seqlen_q, or cu_seqlens_q[b + 1] - cu_seqlens_q[b];
    // n_b = seqused_k[b], or cu_seqlens_k[b + 1] - cu_seqlens_k[b], or seqlen_k: the first of these that there is.
    // Key j is visible to query i iff leftpad_k[b] <= j < n_b, and
    //     i + offset_b - left <= j <= i + offset_b + right (2^40: unbounded), or j < prefix_lens[b], and
    //     q_segments[b, i] == k_segments[b, j], and the mask is true and the bias not -inf there.
    int64_t left;
    int64_t right;
    int64_t offset;
    bool relative_offset;  // offset_b = offset + n_b - m_b; else offset_b = offset

    // Philox4x32-10 with key (seed low, seed high) and counter (j / 4, i, (b*heads_q + h) low, high);
    // word j % 4 drops the entry iff word < dropout_threshold = floor(dropout_p * 2^32).
    uint64_t dropout_threshold;   // 0: no dropout; 2^32: everything dropped
    const int64_t* dropout_seed;  // one element, on the device
    double dropout_scale;         // 1 / (1 - dropout_p), 0 when dropout_p = 1

    int64_t total_q;     // rows of packed q, out and lse; -1: not packed
    int64_t total_k;     // rows of packed k and v; -1: not packed, or paged
    int64_t page_size;   // keys to a page; 0: not paged
    int64_t num_pages;   // of k and v; 0: not paged
    int64_t num_splits;  // parts that the keys are split into; 0: the kernel chooses

    // Packed: batch is 1 in these tensors and seqlen_q is total_q: query i of sequence b is row cu_seqlens_q[b] + i.
    // Keys likewise, unless paged: then k and v are (num_pages, heads_k, page_size, head_dim), and key j of sequence b
    // is row j % page_size of page block_table[b, j / page_size].
    Tensor4 q;     // (batch, heads_q, seqlen_q, head_dim_qk)
    Tensor4 k;     // (batch, heads_k, seqlen_k, head_dim_qk)
    Tensor4 v;     // (batch, heads_k, seqlen_k, head_dim_v)
    Tensor4 mask;  // (batch, heads_q, seqlen_q, seqlen_k) bool, true = visible; null data: none
    Tensor4 bias;  // (batch, heads_q, seqlen_q, seqlen_k) of bias_dtype; null data: none
    Tensor4 out;   // (batch, heads_q, seqlen_q, head_dim_v)
    Tensor4 lse;  // (batch, heads_q, seqlen_q) float, double for double inputs; natural log, sinks included; -inf: sees
                  // nothing

    Table<float> alibi_slopes;    // (batch, heads_q): -slope * |i + offset_b - j| is added to the scores
    Table<void> sinks;            // (heads_q) of lse's type: exp(sink - lse) is what the weights of a row lack to 1
    Table<int32_t> q_segments;    // (batch, seqlen_q)
    Table<int32_t> k_segments;    // (batch, seqlen_k)
    Table<int32_t> prefix_lens;   // (batch)
    Table<int32_t> cu_seqlens_q;  // (batch + 1), from 0 to total_q
    Table<int32_t> cu_seqlens_k;  // (batch + 1), from 0 to total_k
    Table<int32_t> seqused_k;     // (batch)
    Table<int32_t> leftpad_k;     // (batch)
    Table<int32_t> block_table;   // (batch, pages)
    Table<float> q_descale;       // (batch, heads_k): q stands for q q_descale, likewise k and v; null: 1; kE4M3 only
    Table<float> k_descale;       // (batch, heads_k)
    Table<float> v_descale;       // (batch, heads_k)

    // Backward only. The sinks' gradient is not a kernel's: fastattn/ops.py takes it from lse.
    Tensor4 grad_out;       // like out
    Tensor4 grad_lse;       // like lse; null data: none
    Tensor4 dq;             // like q
    Tensor4 dk;             // like k
    Tensor4 dv;             // like v
    Tensor4 dbias;          // bias_dtype, shape bias_shape; null data: not wanted
    int64_t bias_shape[4];  // of bias before broadcasting: dbias is summed over the dimensions of size 1

    bool deterministic;   // CUDA backward: every sum in one order, no atomics
    void* workspace;      // scratch memory on the device, as much as the entry point says
    int64_t device;       // CUDA device index; unused on the CPU
    int64_t num_threads;  // CPU only
};

}  // namespace fastattn
