// What vectorised loads and stores carry, and a value seen as another type of the same size.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

struct alignas(8) Words2 {
    uint32_t x, y;
};
struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};
struct alignas(16) Float4 {
    float x, y, z, w;
};

template <typename To, typename From>
FASTATTN_DEVICE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace fastattn::cuda
