// Tensor maps, made on the host: what the tensor memory accelerator knows of a tensor and of the boxes copied from it.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/launch.h"
#include "cuda/ptx/tma.h"
#include "params.h"

namespace fastattn::cuda {

// CUDA Driver API, "cuTensorMapEncodeTiled". Dimensions innermost first: (head_dim, seq, heads, batch) of a 16-bit
// tensor whose last stride is 1; strides, in elements, of the other three. box: columns, rows; columns are one swizzle
// span, of 128 or 64 bytes.
inline TensorMap make_tensor_map(DType dtype, void* data, const int64_t (&size)[4], const int64_t (&stride)[3],
                                 int columns, int rows) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                    &found),
                   "cudaGetDriverEntryPointByVersion");
        check(function != nullptr && found == cudaDriverEntryPointSuccess,
              "the CUDA driver has no cuTensorMapEncodeTiled; it must be of version 12.0 or later");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    cuuint64_t sizes[4], strides[3];
    for (int d = 0; d < 4; ++d) sizes[d] = static_cast<cuuint64_t>(size[d]);
    for (int d = 0; d < 3; ++d) strides[d] = static_cast<cuuint64_t>(2 * stride[d]);
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1, 1};
    const cuuint32_t one[4] = {1, 1, 1, 1};
    TensorMap map;
    const CUresult result = encode(
        &map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, data,
        sizes, strides, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
        columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(result), " for sizes ", size[0],
          ", ", size[1], ", ", size[2], ", ", size[3], " and strides ", stride[0], ", ", stride[1], ", ", stride[2]);
    return map;
}

}  // namespace fastattn::cuda
