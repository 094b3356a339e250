// The description of a tensor in global memory that TMA copies boxes of (sm_90).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "check.h"
#include "cuda/launch.h"
#include "cuda/ptx/execution.h"
#include "params.h"

namespace fastattn::cuda {

using TensorMap = CUtensorMap;

// How a box's rows, of at most so many bytes, lie in shared memory; see cuda/ptx/descriptor.h.
enum class Swizzle { kNone, k32Bytes, k64Bytes, k128Bytes };

// Dimension 0 is contiguous; stride[n] is in bytes and of dimension n + 1, a multiple of 16. Where a box reaches out of
// the tensor, loads give 0 and stores leave memory alone. base is a multiple of 16.
//
// CUDA Driver API, "Tensor Map Object Management": cuTensorMapEncodeTiled, taken from the driver at run time, so that
// nothing links against it.
template <int kRank>
TensorMap make_tensor_map(DType dtype, const void* base, const int64_t (&dim)[kRank],
                          const int64_t (&stride)[kRank - 1], const int (&box)[kRank], Swizzle swizzle) {
    static_assert(2 <= kRank && kRank <= 5);
    static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
    if (!encode) {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        check_cuda(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
            "cudaGetDriverEntryPointByVersion");
#else
        check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
                   "cudaGetDriverEntryPoint");
#endif
        check(found == cudaDriverEntryPointSuccess && function, "the CUDA driver has no cuTensorMapEncodeTiled");
        encode = reinterpret_cast<decltype(encode)>(function);
    }
    constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                                CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    check(dtype != DType::kFloat64, "a tensor map of float64");
    const CUtensorMapDataType type = dtype == DType::kFloat16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                     : dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    cuuint64_t dims[kRank], strides[kRank - 1];
    cuuint32_t boxes[kRank], steps[kRank];
    for (int n = 0; n < kRank; ++n) {
        dims[n] = static_cast<cuuint64_t>(dim[n]);
        boxes[n] = static_cast<cuuint32_t>(box[n]);
        steps[n] = 1;
        if (n > 0) strides[n - 1] = static_cast<cuuint64_t>(stride[n - 1]);
    }
    TensorMap map;
    const CUresult result = encode(&map, type, kRank, const_cast<void*>(base), dims, strides, boxes, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(swizzle)],
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(result), " for rank ", kRank,
          ", dimension 0 of ", dim[0], ", box ", box[0], " x ", box[1], ", stride ", stride[0], " bytes");
    return map;
}

// PTX ISA, "Data Movement and Conversion Instructions: prefetch, prefetchu": .tensormap.
FASTATTN_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace fastattn::cuda
