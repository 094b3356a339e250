// The CPU kernels of one instruction set: compiled once for each, with -DFASTATTN_CPU_ISA=name and its flags.
#include "attention.h"
#include "backward.h"
#include "forward.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace fastattn::cpu::FASTATTN_CPU_ISA {

#if defined(__AMX_BF16__)
using BFloat16Products = AmxProducts;
#else
using BFloat16Products = VectorProducts<BFloat16, float>;
#endif

void attention_forward(const AttentionParams& p) {
    switch (p.dtype) {
        case DType::kFloat16:
            return Forward<VectorProducts<Half, float>>(p).run();
        case DType::kBFloat16:
            return Forward<BFloat16Products>(p).run();
        case DType::kFloat32:
            return Forward<VectorProducts<float, float>>(p).run();
        case DType::kFloat64:
            return Forward<VectorProducts<double, double>>(p).run();
    }
}

void attention_backward(const AttentionParams& p) {
    switch (p.dtype) {
        case DType::kFloat16:
            return Backward<VectorProducts<Half, float>>(p).run();
        case DType::kBFloat16:
            return Backward<BFloat16Products>(p).run();
        case DType::kFloat32:
            return Backward<VectorProducts<float, float>>(p).run();
        case DType::kFloat64:
            return Backward<VectorProducts<double, double>>(p).run();
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
