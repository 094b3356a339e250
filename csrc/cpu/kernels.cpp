// The CPU kernels of one instruction set: compiled once for each, with -DFASTATTN_CPU_ISA=name and its flags.
#include "attention.h"
#include "backward.h"
#include "forward.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

void attention_forward(const AttentionParams& p) {
    switch (p.dtype) {
        case DType::kFloat16:
            return Forward<Half, float>(p).run();
        case DType::kBFloat16:
            return Forward<BFloat16, float>(p).run();
        case DType::kFloat32:
            return Forward<float, float>(p).run();
        case DType::kFloat64:
            return Forward<double, double>(p).run();
    }
}

void attention_backward(const AttentionParams& p) {
    switch (p.dtype) {
        case DType::kFloat16:
            return Backward<Half, float>(p).run();
        case DType::kBFloat16:
            return Backward<BFloat16, float>(p).run();
        case DType::kFloat32:
            return Backward<float, float>(p).run();
        case DType::kFloat64:
            return Backward<double, double>(p).run();
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
