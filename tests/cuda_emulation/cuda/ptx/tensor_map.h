// In the place of csrc/cuda/ptx/tensor_map.h: the same names on the emulator.
#pragma once

#include "check.h"
#include "cuda/ptx/execution.h"
#include "emulator/hopper.h"
#include "params.h"

namespace fastattn::cuda {

using emulation::TensorMap;

enum class Swizzle { kNone, k32Bytes, k64Bytes, k128Bytes };

// Refuses what cuTensorMapEncodeTiled refuses.
template <int kRank>
TensorMap make_tensor_map(DType dtype, const void* base, const int64_t (&dim)[kRank],
                          const int64_t (&stride)[kRank - 1], const int (&box)[kRank], Swizzle swizzle) {
    static_assert(2 <= kRank && kRank <= 5);
    check(dtype != DType::kFloat64, "a tensor map of float64");
    TensorMap map;
    map.base = static_cast<char*>(const_cast<void*>(base));
    map.element = dtype == DType::kFloat16    ? emulation::Element::kFloat16
                  : dtype == DType::kBFloat16 ? emulation::Element::kBFloat16
                                              : emulation::Element::kFloat32;
    map.rank = kRank;
    map.swizzle_bytes = swizzle == Swizzle::kNone ? 0 : 16 << static_cast<int>(swizzle);
    const int inner = box[0] * map.element_bytes();
    check(reinterpret_cast<uintptr_t>(base) % 16 == 0, "a tensor map's base must be a multiple of 16 bytes");
    check(inner % 16 == 0, "a box of ", inner, " bytes a row: must be a multiple of 16");
    check(!map.swizzle_bytes || inner <= map.swizzle_bytes, "a box of ", inner, " bytes a row, swizzled in ",
          map.swizzle_bytes);
    for (int n = 0; n < kRank; ++n) {
        check(0 < dim[n] && dim[n] <= int64_t{1} << 32, "a tensor map's dimension ", n, " of ", dim[n]);
        check(0 < box[n] && box[n] <= 256, "a box of ", box[n], " in dimension ", n, ": 1 to 256");
        map.dim[n] = dim[n];
        map.box[n] = box[n];
        if (n == 0) continue;
        const int64_t bytes = stride[n - 1];
        check(0 < bytes && bytes < int64_t{1} << 40 && bytes % 16 == 0, "a tensor map's stride of ", bytes,
              " bytes in dimension ", n, ": must be positive, less than 2^40 and a multiple of 16");
        map.stride[n] = bytes;
    }
    return map;
}

inline void prefetch_tensor_map(const TensorMap*) {}

}  // namespace fastattn::cuda
