// In the place of csrc/cuda/launch.h: kernels run on the host, before launch() returns.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "check.h"
#include "emulator/api.h"

namespace fastattn::cuda {

class DeviceGuard {
public:
    explicit DeviceGuard(int64_t) {}
};

inline int64_t multiprocessors(int64_t) { return 4; }

// FASTATTN_EMULATED_CAPABILITY=90: a Hopper device.
inline int64_t compute_capability(int64_t) {
    const char* asked = std::getenv("FASTATTN_EMULATED_CAPABILITY");
    return asked ? std::atoi(asked) : 80;
}

struct Grid {
    int64_t x, y = 1, z = 1;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void*,
            const Arguments&... arguments) {
    static_assert((std::is_same_v<Parameters, Arguments> && ...), "arguments must have the kernel's own types");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    check(grid.x <= 0x7fffffff && grid.y <= 0xffff && grid.z <= 0xffff, "a grid of ", grid.x, " x ", grid.y, " x ",
          grid.z, " blocks: CUDA takes at most (2^31 - 1) x 65535 x 65535");
    emulation::launch(grid.x, grid.y, grid.z, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace fastattn::cuda
