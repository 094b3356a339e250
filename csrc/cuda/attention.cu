// Host side: the checks, the device, and which kernel takes a call.
#include "cuda/attention.h"

#include <algorithm>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/simt/kernels.h"

namespace fastattn::cuda {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// Calls f(T{}, kHeadDim as a constant) for the element type and the smallest bucket that holds head_dim.
template <typename T, typename F>
void with_head_dim(int64_t head_dim, const F& f) {
    check(head_dim <= kMaxHeadDim, "head_dim ", head_dim, ": the CUDA kernels take at most ", kMaxHeadDim);
    if (head_dim <= 64) return f(T{}, std::integral_constant<int, 64>{});
    if (head_dim <= 128) return f(T{}, std::integral_constant<int, 128>{});
    return f(T{}, std::integral_constant<int, 256>{});
}

template <typename F>
void dispatch(DType dtype, int64_t head_dim, const F& f) {
    switch (dtype) {
        case DType::kFloat16:
            return with_head_dim<Half>(head_dim, f);
        case DType::kBFloat16:
            return with_head_dim<BFloat16>(head_dim, f);
        case DType::kFloat32:
            return with_head_dim<float>(head_dim, f);
        default:
            check(false, "dtype code ", static_cast<int>(dtype), ": the CUDA kernels take float16, bfloat16, float32");
    }
}

void check_params(const AttentionParams& p) {
    check(p.heads_k > 0 && p.heads_q % p.heads_k == 0, "heads_q ", p.heads_q, " is no multiple of heads_k ", p.heads_k);
    check(!p.bias.data || p.bias_dtype != DType::kFloat64, "a float64 bias");
    check(p.seqlen_q < (int64_t{1} << 32) && p.seqlen_k < (int64_t{1} << 34), "seqlen_q ", p.seqlen_q, ", seqlen_k ",
          p.seqlen_k, ": too long for the dropout counter");
}

}  // namespace

size_t backward_workspace_bytes(const AttentionParams& p) {
    return sizeof(float) * static_cast<size_t>(p.batch * p.heads_q * p.seqlen_q);
}

void attention_forward(const AttentionParams& p, void* stream) {
    check_params(p);
    const DeviceGuard guard(p.device);
    dispatch(p.dtype, p.head_dim_v, [&](auto element, auto head_dim) {
        simt::forward<decltype(element), decltype(head_dim)::value>(p, stream);
    });
}

void attention_backward(const AttentionParams& p, void* stream) {
    check_params(p);
    check(p.workspace != nullptr, "the backward needs ", backward_workspace_bytes(p), " bytes of workspace");
    const DeviceGuard guard(p.device);
    dispatch(p.dtype, std::max(p.head_dim_qk, p.head_dim_v), [&](auto element, auto head_dim) {
        simt::backward<decltype(element), decltype(head_dim)::value>(p, stream);
    });
}

}  // namespace fastattn::cuda
