// Tensor maps of the arguments of a call; host only.
#pragma once

#include "cuda/tensor_map.h"

namespace fastattn::cuda::sm90 {

// Boxes of one span of Tile and `rows` rows of a (batch, heads, seq, head_dim) tensor. The stride of a dimension of size
// 1 is never used, but looked at.
template <typename Tile>
TensorMap tensor_map(DType dtype, const Tensor4& x, int64_t batch, int64_t heads, int64_t seq, int64_t dim, int rows) {
    const auto stride = [&](int d, int64_t size) { return size == 1 ? int64_t{8} : x.stride[d]; };
    return make_tensor_map(dtype, x.data, {dim, seq, heads, batch}, {stride(2, seq), stride(1, heads), stride(0, batch)},
                           Tile::kSpan, rows);
}

}  // namespace fastattn::cuda::sm90
