// The stated error bounds of exp, exp2_for_bfloat16, tanh and the weights of a softmax in one instruction set
// (FASTATTN_CPU_ISA), and the order in which memory is asked for.
#include <cstdio>
#include <cstdlib>

#include "cpu/softmax.h"
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
void check_functions(double exp_bound, double tanh_bound, double weight_slope) {
    for (double x = -80; x < 0.5; x += 0.000917) {
        const C argument = static_cast<C>(x);
        const double wide = static_cast<double>(argument), truth = std::exp(wide);
        const double error = std::fabs(static_cast<double>(kernels::exp_of<C>(argument)) / truth - 1);
        if (!(error <= exp_bound)) fail("exp's relative error", error);
        const double weight = static_cast<double>(kernels::weight_of<C>(kernels::splat(argument))[0]);
        const double bound = exp_bound + weight_slope * std::fabs(wide);
        if (!(std::fabs(weight / truth - 1) <= bound)) fail("a weight's relative error", weight / truth - 1);
        if (!(std::fabs(weight - truth) <= exp_bound * std::fmax(truth, 1))) fail("a weight's error", weight - truth);
        const double t = std::tanh(wide / 16),
                     got = static_cast<double>(kernels::tanh<C>(kernels::splat<C>(static_cast<C>(wide / 16)))[0]);
        if (!(std::fabs(got - t) <= tanh_bound * std::fabs(t))) fail("tanh's relative error", std::fabs(got / t - 1));
    }
    constexpr C inf = kernels::kInfinity<C>;
    for (const C x : {-inf, C(-1e30), C(std::nan(""))}) {
        const C weight = kernels::weight_of<C>(kernels::splat(x))[0];
        if (!(std::isnan(x) ? std::isnan(weight) : weight == 0)) fail("the weight of -inf, -1e30 or NaN", weight);
    }
    if (kernels::weight_of<C>(kernels::Vector<C>{})[0] != 1) fail("the weight of 0", 0);
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

// Every line once, what was added last first.
void check_ahead() {
    const char memory[400] = {};
    kernels::Ahead ahead;
    ahead.add(memory, 65), ahead.add(memory + 128, 192);
    for (const int line : {2, 3, 4, 0, 1}) {
        if (ahead.take(1) != memory + 64 * line) fail("not the next line", line);
    }
    ahead.add(memory, 192);
    if (ahead.take(2) != memory || ahead.take(2) != memory + 128 || ahead.take(2) != nullptr) fail("lines left", 0);
}

}  // namespace

int main() {
#if defined(__AVX512BF16__)
    check_exp2_for_bfloat16();
#endif
    check_ahead();
    check_functions<float>(0x1p-22, 0x1p-21, 0x1p-23);
    check_functions<double>(0x1p-51, 0x1p-50, 0);
    std::printf("within bounds\n");
}
