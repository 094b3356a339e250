// Tensor maps of the arguments of a call; host only.
#pragma once

#include "cuda/band.h"
#include "cuda/ptx/tensor_map.h"

namespace fastattn::cuda::sm90 {

// Boxes of one span of Tile and `rows` rows of a (batch, heads, seq, head_dim) tensor. The stride of a dimension of
// size 1 is never used, but looked at.
template <typename Tile>
TensorMap tensor_map(DType dtype, const Tensor4& x, int64_t batch, int64_t heads, int64_t seq, int64_t dim, int rows) {
    const auto bytes = [&](int d, int64_t size) { return size == 1 ? int64_t{16} : 2 * x.stride[d]; };
    return make_tensor_map<4>(dtype, x.data, {dim, seq, heads, batch},
                              {bytes(2, seq), bytes(1, heads), bytes(0, batch)}, {Tile::kSpan, rows, 1, 1},
                              Tile::kSwizzle);
}

// Of q and its like, of k and its like. Packed sequences lie in one tensor, their boxes reach into the next sequence.
template <typename Tile>
TensorMap query_map(const AttentionParams& p, const Tensor4& x, int64_t dim, int rows) {
    return tensor_map<Tile>(p.dtype, x, batches_q(p), p.heads_q, rows_q(p), dim, rows);
}
// Pages: a number of the block table that no page has copies zeros.
template <typename Tile>
TensorMap key_map(const AttentionParams& p, const Tensor4& x, int64_t dim, int rows) {
    if (p.page_size != 0) return tensor_map<Tile>(p.dtype, x, p.num_pages, p.heads_k, p.page_size, dim, rows);
    return tensor_map<Tile>(p.dtype, x, batches_k(p), p.heads_k, rows_k(p), dim, rows);
}

}  // namespace fastattn::cuda::sm90
