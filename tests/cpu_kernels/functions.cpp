// The stated error bounds of exp, exp2_for_bfloat16 and tanh in one instruction set (FASTATTN_CPU_ISA).
#include <cstdio>
#include <cstdlib>

#include "cpu/vector.h"
#if defined(__AVX512BF16__)
#include "cpu/bfloat16_forward.h"
#endif

namespace {

namespace kernels = fastattn::cpu::FASTATTN_CPU_ISA;

[[noreturn]] void fail(const char* what, double value) {
    std::printf("FAILED: %s: %.9g\n", what, value);
    std::exit(1);
}

template <typename C>
void check_functions(double exp_bound, double tanh_bound) {
    for (double x = -80; x < 0.5; x += 0.000917) {
        const C argument = static_cast<C>(x);
        const double wide = static_cast<double>(argument), truth = std::exp(wide);
        const double error = std::fabs(static_cast<double>(kernels::exp_of<C>(argument)) / truth - 1);
        if (!(error <= exp_bound)) fail("exp's relative error", error);
        const double t = std::tanh(wide / 16),
                     got = static_cast<double>(kernels::tanh<C>(kernels::splat<C>(static_cast<C>(wide / 16)))[0]);
        if (!(std::fabs(got - t) <= tanh_bound * std::fabs(t))) fail("tanh's relative error", std::fabs(got / t - 1));
    }
    constexpr C inf = kernels::kInfinity<C>;
    if (kernels::exp_of<C>(-inf) != 0 || !std::isnan(kernels::exp_of<C>(std::nan("")))) fail("exp of -inf, NaN", 0);
}

#if defined(__AVX512BF16__)
void check_exp2_for_bfloat16() {
    const auto exp2 = [](float x) { return _mm512_cvtss_f32(kernels::exp2_for_bfloat16(_mm512_set1_ps(x))); };
    for (double x = -126; x < 0.5; x += 0.000917) {
        const float argument = static_cast<float>(x);
        const double error = std::fabs(exp2(argument) / std::exp2(static_cast<double>(argument)) - 1);
        if (!(error <= 0x1p-18)) fail("exp2_for_bfloat16's relative error", error);
    }
    const float inf = kernels::kInfinity<float>;
    if (exp2(-inf) != 0 || exp2(-127) != 0 || !std::isnan(exp2(std::nanf("")))) {
        fail("exp2_for_bfloat16 of -inf, -127, NaN", 0);
    }
}
#endif

}  // namespace

int main() {
#if defined(__AVX512BF16__)
    check_exp2_for_bfloat16();
#endif
    check_functions<float>(0x1p-22, 0x1p-21);
    check_functions<double>(0x1p-51, 0x1p-50);
    std::printf("within bounds\n");
}
