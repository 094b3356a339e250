// Host side: the checks, the device, and which kernel takes a call.
#include "cuda/attention.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <type_traits>

#include "cuda/band.h"
#include "cuda/launch.h"
#include "cuda/simt/kernels.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/tiles.h"
#ifdef FASTATTN_WITH_SM90
#include "cuda/sm90/dispatch.h"
#include "cuda/sm90/dispatch_fp8.h"
#endif

namespace fastattn::cuda {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kFewQueries = 16;  // up to so many, a call is split along the keys to fill the device
constexpr int64_t kMaxSplits = 64;

int64_t head_dim(const AttentionParams& p) { return std::max(p.head_dim_qk, p.head_dim_v); }
int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Calls f with the smallest of the buckets that holds x, as a constant.
template <int kFirst, int... kRest, typename F>
void with_bucket(int64_t x, const F& f) {
    if (x <= kFirst) return f(std::integral_constant<int, kFirst>{});
    if constexpr (sizeof...(kRest) > 0) {
        with_bucket<kRest...>(x, f);
    } else {
        check(false, "head_dim ", x, ": the CUDA kernels take at most ", kMaxHeadDim);
    }
}

// Calls f with an element of a 16-bit dtype.
template <typename F>
void with_element(DType dtype, const F& f) {
    dtype == DType::kFloat16 ? f(Half{}) : f(BFloat16{});
}

bool use_tensor_cores(const AttentionParams& p) { return p.dtype != DType::kFloat32; }

void check_params(const AttentionParams& p) {
    constexpr int64_t kMaxLength = int64_t{1} << 30;  // queries and keys are numbered with 32 bits
    check(p.dtype != DType::kFloat64, "float64: the CUDA kernels take float16, bfloat16, float32");
    check(p.heads_k > 0 && p.heads_q % p.heads_k == 0, "heads_q ", p.heads_q, " is no multiple of heads_k ", p.heads_k);
    check(!p.bias.data || p.bias_dtype != DType::kFloat64, "a float64 bias");
    check(p.seqlen_q < kMaxLength && p.seqlen_k < kMaxLength, "seqlen_q ", p.seqlen_q, ", seqlen_k ", p.seqlen_k,
          ": must be less than 2^30");
}

// Rows that are made of 16-byte chunks; a dimension that is never stepped along may have any stride.
bool in_chunks(const Tensor4& x, int64_t head_dim) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && head_dim % 8 == 0 && x.stride[0] % 8 == 0 &&
           x.stride[1] % 8 == 0 && x.stride[2] % 8 == 0 && x.stride[3] == 1;
}

bool few_queries(const AttentionParams& p) { return p.seqlen_q <= kFewQueries; }
// Whether single entries of the score matrix are to be looked at, beyond the window.
bool by_entry(const AttentionParams& p) {
    return p.mask.data || p.bias.data || p.dropout_threshold != 0 || p.softcap != 0 || p.alibi_slopes.data ||
           p.q_segments.data || p.prefix_lens.data || p.leftpad_k.data;
}
bool asks_for_general_forward(const AttentionParams& p) {
    return few_queries(p) || by_entry(p) || p.block_table.data || p.sinks.data || !(p.softmax_scale > 0);
}
bool forward_is_general(const AttentionParams& p) {
    return asks_for_general_forward(p) || !in_chunks(p.q, p.head_dim_qk) || !in_chunks(p.k, p.head_dim_qk) ||
           !in_chunks(p.v, p.head_dim_v) || !in_chunks(p.out, p.head_dim_v);
}
bool backward_is_general(const AttentionParams& p) {
    return by_entry(p) || !in_chunks(p.q, p.head_dim_qk) || !in_chunks(p.k, p.head_dim_qk) ||
           !in_chunks(p.v, p.head_dim_v) || !in_chunks(p.grad_out, p.head_dim_v);
}

// The parts into which the keys are divided: as many as asked for; else, when there are few queries, the fewest that
// come within 85% of the best use of the device, a part being at least four tiles of keys.
int64_t num_splits(const AttentionParams& p) {
    if (!use_tensor_cores(p)) return 1;
    if (p.num_splits > 0) return std::min(p.num_splits, kMaxSplits);
    if (!few_queries(p)) return 1;
    const sm80::ForwardTile tile = sm80::general_forward_tile(static_cast<int>(head_dim(p)));
    const int64_t blocks = p.batch * p.heads_k * tiles(p.heads_q / p.heads_k * p.seqlen_q, tile.queries);
    const int64_t slots = 2 * multiprocessors(p.device);  // two blocks a multiprocessor hide each other's waits
    const int64_t most = std::min(kMaxSplits, tiles(p.seqlen_k, 4 * tile.keys));
    if (5 * blocks >= 4 * slots) return 1;
    const auto efficiency = [&](int64_t splits) {
        return static_cast<double>(blocks * splits) / static_cast<double>(tiles(blocks * splits, slots) * slots);
    };
    double best = 0;
    for (int64_t splits = 1; splits <= most; ++splits) best = std::max(best, efficiency(splits));
    for (int64_t splits = 1; splits < most; ++splits) {
        if (efficiency(splits) >= 0.85 * best) return splits;
    }
    return most;
}

void forward_on_tensor_cores(AttentionParams p, void* stream) {
    p.num_splits = num_splits(p);
    check(p.num_splits == 1 || p.workspace != nullptr, "the forward needs ", forward_workspace_bytes(p),
          " bytes of workspace");
    with_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (p.num_splits > 1 || forward_is_general(p)) {
            with_bucket<64, 128, 256>(head_dim(p), [&](auto bucket) { sm80::forward_general<T, bucket>(p, stream); });
        } else {
            with_bucket<32, 64, 96, 128, 192, 256>(head_dim(p),
                                                   [&](auto bucket) { sm80::forward<T, bucket>(p, stream); });
        }
    });
}

template <typename T, int kHeadDim, bool kGeneral>
void backward_passes(const AttentionParams& p, void* stream) {
    sm80::prepare<T>(p, stream);
    sm80::dkdv<T, kHeadDim, kGeneral>(p, stream);
    if (p.deterministic) {
        sm80::dq<T, kHeadDim, kGeneral>(p, stream);
    } else {
        sm80::convert_dq<T>(p, stream);
    }
}

void backward_on_tensor_cores(const AttentionParams& p, void* stream) {
    with_element(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (backward_is_general(p)) {
            with_bucket<64, 128, 256>(head_dim(p), [&](auto bucket) { backward_passes<T, bucket, true>(p, stream); });
        } else {
            with_bucket<32, 64, 96, 128, 192, 256>(head_dim(p),
                                                   [&](auto bucket) { backward_passes<T, bucket, false>(p, stream); });
        }
    });
}

// The order of kernels on a device of compute capability 9.0: sm90, then sm80. Neither has run on a GPU; both pass the
// same emulated cases. What speaks for this order is what the instructions of each have reached elsewhere: on an H100,
// FlashAttention-2 (mma.sync, as in sm80/) 370 TFLOP/s, FlashAttention-3 (wgmma, as in sm90/) 648 (its paper, fp16,
// head_dim 128, 16k). FASTATTN_CUDA_KERNELS=sm80 leaves the Hopper kernels out.
bool use_sm90([[maybe_unused]] const AttentionParams& p) {
#ifdef FASTATTN_WITH_SM90
    const char* kernels = std::getenv("FASTATTN_CUDA_KERNELS");
    if (kernels && std::string(kernels).find("sm90") == std::string::npos) return false;
    return use_tensor_cores(p) && compute_capability(p.device) == 90;
#else
    return false;
#endif
}

#ifdef FASTATTN_WITH_SM90
std::string sm90_reason(const AttentionParams& p, bool backward) {
    return backward ? sm90::backward_reason(p) : sm90::forward_reason(p);
}
#endif

}  // namespace

std::string e4m3_reason([[maybe_unused]] const AttentionParams& p) {
#ifdef FASTATTN_WITH_SM90
    if (compute_capability(p.device) == 90) return sm90::fp8_reason(p);
    return "compute capability is not 9.0, which the e4m3 kernel is for";
#else
    return "built without the Hopper kernels, of which the one for e4m3 is";
#endif
}

std::string configuration(const AttentionParams& p, bool backward) {
    std::ostringstream text;
#ifdef FASTATTN_WITH_SM90
    if (p.dtype == DType::kE4M3) return sm90::fp8_configuration(p);
#endif
#ifdef FASTATTN_WITH_SM90
    if (use_sm90(p)) {
        const std::string reason = sm90_reason(p, backward);
        if (reason.empty()) return sm90::configuration(p, backward);
        text << "not the Hopper " << (backward ? "backward" : "forward") << " (" << reason << ") but ";
    }
#endif
    const int dim = static_cast<int>(head_dim(p));
    if (!use_tensor_cores(p)) {
        text << "general SIMT kernel (no tensor cores), tiles of 64 queries x 64 keys";
    } else if (backward) {
        const sm80::KeyTile tile = by_entry(p) ? sm80::general_key_tile(dim) : sm80::key_tile(dim);
        text << "tensor cores (sm_80), " << (by_entry(p) ? "general backward" : "backward") << ", tiles of "
             << tile.queries << " queries x " << tile.keys << " keys, " << tile.warps << " warps";
    } else {
        const bool general = asks_for_general_forward(p);
        const sm80::ForwardTile tile = general ? sm80::general_forward_tile(dim) : sm80::forward_tile(dim);
        text << "tensor cores (sm_80), " << (general ? "general forward" : "forward") << ", tiles of " << tile.queries
             << " queries x " << tile.keys << " keys, " << tile.warps << " warps";
        if (few_queries(p)) text << ", up to " << kMaxSplits << " splits of the keys";
    }
    return text.str();
}

size_t forward_workspace_bytes(const AttentionParams& p) {
#ifdef FASTATTN_WITH_SM90
    if (p.dtype == DType::kE4M3) return static_cast<size_t>(sm90::fp8_workspace_bytes(p));
#endif
    const int64_t splits = num_splits(p);
    int64_t bytes = 0;
    if (splits > 1) bytes = static_cast<int64_t>(sizeof(float)) * splits * all_rows(p) * (p.head_dim_v + 1);
#ifdef FASTATTN_WITH_SM90  // whichever of the two is taken, when strides and the environment are known
    if (use_tensor_cores(p) && compute_capability(p.device) == 90 && sm90::forward_reason(p).empty()) {
        bytes = std::max(bytes, sm90::forward_workspace_bytes(p));
    }
#endif
    return static_cast<size_t>(bytes);
}

size_t backward_workspace_bytes(const AttentionParams& p) {
    int64_t floats = 1;                                                            // of each query: delta,
    if (use_tensor_cores(p)) floats += 1 + (p.deterministic ? 0 : p.head_dim_qk);  // lse, the sums of dQ
    auto bytes = static_cast<int64_t>(sizeof(float)) * all_rows(p) * floats;
#ifdef FASTATTN_WITH_SM90
    if (sm90::backward_reason(p).empty()) bytes = std::max(bytes, sm90::backward_workspace_bytes(p));
#endif
    return static_cast<size_t>(bytes);
}

void attention_forward(const AttentionParams& p, void* stream) {
    check_params(p);
    const DeviceGuard guard(p.device);
    if (p.dtype == DType::kE4M3) {
        const std::string reason = e4m3_reason(p);
        check(reason.empty(), "e4m3: ", reason);
    }
#ifdef FASTATTN_WITH_SM90
    if (p.dtype == DType::kE4M3) return sm90::fp8_forward(p, stream);
    if (use_sm90(p) && sm90_reason(p, false).empty()) return sm90::attention_forward(p, stream);
#endif
    if (use_tensor_cores(p)) return forward_on_tensor_cores(p, stream);
    with_bucket<64, 128, 256>(p.head_dim_v, [&](auto bucket) { simt::forward<float, bucket>(p, stream); });
}

void attention_backward(const AttentionParams& p, void* stream) {
    check_params(p);
    check(p.dtype != DType::kE4M3, "e4m3 has no backward");
    check(p.workspace != nullptr, "the backward needs ", backward_workspace_bytes(p), " bytes of workspace");
    const DeviceGuard guard(p.device);
#ifdef FASTATTN_WITH_SM90
    if (use_sm90(p) && sm90_reason(p, true).empty()) return sm90::attention_backward(p, stream);
#endif
    if (use_tensor_cores(p)) {
        backward_on_tensor_cores(p, stream);
    } else {
        with_bucket<64, 128, 256>(head_dim(p), [&](auto bucket) { simt::backward<float, bucket>(p, stream); });
    }
    if (!p.dbias.data) return;
    if (p.dtype == DType::kFloat32) return simt::dbias<float>(p, stream);
    with_element(p.dtype, [&](auto element) { simt::dbias<decltype(element)>(p, stream); });
}

}  // namespace fastattn::cuda
