// Chooses the instruction set, once, when first asked.
#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn::cpu {

#define FASTATTN_DECLARE(isa)                          \
    namespace isa {                                    \
    void attention_forward(const AttentionParams& p);  \
    void attention_backward(const AttentionParams& p); \
    }
FASTATTN_DECLARE(portable)
// FASTATTN_WITH_*: what setup.py has compiled, for the compilers that know these instructions.
#if defined(FASTATTN_WITH_AVX2)
FASTATTN_DECLARE(avx2)
#endif
#if defined(FASTATTN_WITH_AVX512)
FASTATTN_DECLARE(avx512)
#endif
#if defined(FASTATTN_WITH_AVX512_BF16)
FASTATTN_DECLARE(avx512_bf16)
#endif
#if defined(FASTATTN_WITH_AMX)
FASTATTN_DECLARE(amx)
#endif
#undef FASTATTN_DECLARE

namespace {

using Kernel = void (*)(const AttentionParams&);

struct Kernels {
    const char* name;
    bool supported;
    Kernel forward;
    Kernel backward;
};

#if defined(FASTATTN_WITH_AVX512) || defined(FASTATTN_WITH_AVX512_BF16) || defined(FASTATTN_WITH_AMX)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#if defined(FASTATTN_WITH_AMX)
// AMX needs the processor (CPUID 7.0: EDX bits 22 and 24) and, for its 8 KiB of state, Linux's leave, asked for once.
bool has_amx() {
#if defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if (!(edx & (1u << 22)) || !(edx & (1u << 24))) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

// All that were compiled, best first.
std::vector<Kernels> all_kernels() {
    std::vector<Kernels> all = {
#if defined(FASTATTN_WITH_AMX)
        {"amx", has_amx(), amx::attention_forward, amx::attention_backward},
#endif
#if defined(FASTATTN_WITH_AVX512_BF16)
        {"avx512_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), avx512_bf16::attention_forward,
         avx512_bf16::attention_backward},
#endif
#if defined(FASTATTN_WITH_AVX512)
        {"avx512", has_avx512(), avx512::attention_forward, avx512::attention_backward},
#endif
#if defined(FASTATTN_WITH_AVX2)
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::attention_forward,
         avx2::attention_backward},
#endif
        {"portable", true, portable::attention_forward, portable::attention_backward},
    };
#if defined(FASTATTN_WITH_AVX512_BF16) && defined(FASTATTN_WITH_AVX512)
    // vdpbf16ps does twice the work of a multiply-add: on Zen 4 in the same time, on Sapphire Rapids in four times it.
    if (!__builtin_cpu_is("amd")) {
        const auto named = [&](const char* name) {
            return std::find_if(all.begin(), all.end(),
                                [&](const Kernels& k) { return std::strcmp(k.name, name) == 0; });
        };
        std::iter_swap(named("avx512_bf16"), named("avx512"));
    }
#endif
    return all;
}

Kernels choose() {
    const char* wanted = std::getenv("FASTATTN_CPU_ISA");
    std::string known;
    for (const Kernels& kernels : all_kernels()) {
        known += std::string(known.empty() ? "" : ", ") + kernels.name + (kernels.supported ? "" : " (not here)");
        if (wanted == nullptr || *wanted == '\0' ? kernels.supported
                                                 : kernels.supported && std::string(wanted) == kernels.name) {
            return kernels;
        }
    }
    throw std::runtime_error("FASTATTN_CPU_ISA is '" + std::string(wanted) + "'; this processor has: " + known);
}

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

}  // namespace

void attention_forward(const AttentionParams& params) { kernels().forward(params); }
void attention_backward(const AttentionParams& params) { kernels().backward(params); }
const char* instruction_set() { return kernels().name; }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels& kernels : all_kernels()) {
        if (kernels.supported) names.push_back(kernels.name);
    }
    return names;
}

}  // namespace fastattn::cpu
