// The probes' C interface, for ctypes.
#include "probes/probes.h"

#include <cstring>
#include <exception>
#include <string>

namespace fastattn::cuda::probes {

extern const Entry kSm80[];
extern const int kSm80Count;
#ifdef FASTATTN_PROBES_SM80_ONLY
constexpr const Entry* kSm90 = nullptr;
constexpr int kSm90Count = 0;
#else
extern const Entry kSm90[];
extern const int kSm90Count;
#endif

}  // namespace fastattn::cuda::probes

#define FASTATTN_PROBE_EXPORT extern "C" __attribute__((visibility("default")))

// Runs a probe; null, or what went wrong.
FASTATTN_PROBE_EXPORT const char* fastattn_probe(const char* name, const uint32_t* in, int64_t in_words, uint32_t* out,
                                                 int64_t out_words, void* stream) {
    namespace probes = fastattn::cuda::probes;
    static std::string error;
    try {
        for (int n = 0; n < probes::kSm80Count + probes::kSm90Count; ++n) {
            const auto& entry = n < probes::kSm80Count ? probes::kSm80[n] : probes::kSm90[n - probes::kSm80Count];
            if (std::strcmp(entry.name, name)) continue;
            entry.run({in, out, in_words, out_words}, stream);
            return nullptr;
        }
        error = std::string("no probe called ") + name;
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}
