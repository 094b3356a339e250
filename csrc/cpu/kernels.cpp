// The CPU kernels of one instruction set: compiled once for each, with -DFASTATTN_CPU_ISA=name and its flags.
#include "attention.h"
#include "backward.h"
#include "decode.h"
#include "decode_backward.h"
#include "forward.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#include "bfloat16_forward.h"
#elif defined(__AVX512BF16__)
#include "bfloat16_forward.h"
#include "pairs.h"
#endif

namespace fastattn::cpu::FASTATTN_CPU_ISA {

#if defined(__AMX_BF16__)
using BFloat16Products = AmxProducts;
#elif defined(__AVX512BF16__)
using BFloat16Products = PairProducts;
#else
using BFloat16Products = VectorProducts<BFloat16, float>;
#endif

template <typename P>
void forward(const AttentionParams& p) {
    using D = Decode<typename P::T, typename P::C>;
    D::suits(p) ? D(p).run() : Forward<P>(p).run();
}

template <typename P>
void backward(const AttentionParams& p) {
    using D = DecodeBackward<typename P::T, typename P::C>;
    D::suits(p) ? D(p).run() : Backward<P>(p).run();
}

void attention_forward(const AttentionParams& p) {
    switch (p.dtype) {
        case DType::kFloat16:
            return forward<VectorProducts<Half, float>>(p);
        case DType::kBFloat16:
            return forward<BFloat16Products>(p);
        case DType::kFloat32:
            return forward<VectorProducts<float, float>>(p);
        case DType::kFloat64:
            return forward<VectorProducts<double, double>>(p);
        case DType::kE4M3:
            return;  // widened before it comes here
    }
}

void attention_backward(const AttentionParams& p) {
    switch (p.dtype) {
        case DType::kFloat16:
            return backward<VectorProducts<Half, float>>(p);
        case DType::kBFloat16:
            return backward<BFloat16Products>(p);
        case DType::kFloat32:
            return backward<VectorProducts<float, float>>(p);
        case DType::kFloat64:
            return backward<VectorProducts<double, double>>(p);
        case DType::kE4M3:
            return;  // widened before it comes here
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
