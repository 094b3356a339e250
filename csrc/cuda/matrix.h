// The (seq, head_dim) matrix of one head in global memory, in any strides.
#pragma once

#include "cuda/band.h"

namespace fastattn::cuda {

// Whoever reads it takes rows and columns beyond its size as 0.
template <typename T>
struct Matrix {
    T* data;
    int64_t row_stride, col_stride;
    int rows, cols;

    FASTATTN_DEVICE Matrix from(int row, int col) const {
        return {data + row * row_stride + col * col_stride, row_stride, col_stride, rows - row, cols - col};
    }
};

// The queries, or keys, of one head of a sequence.
template <typename T>
FASTATTN_DEVICE Matrix<T> query_matrix(const Tensor4& x, const Band& band, int64_t h, int64_t cols) {
    return {static_cast<T*>(x.data) + band.query_at(x, h), x.stride[2], x.stride[3], band.seqlen_q,
            static_cast<int>(cols)};
}
template <typename T>
FASTATTN_DEVICE Matrix<T> key_matrix(const Tensor4& x, const Band& band, int64_t h, int64_t cols) {
    return {static_cast<T*>(x.data) + band.key_at(x, h), x.stride[2], x.stride[3], band.seqlen_k,
            static_cast<int>(cols)};
}

}  // namespace fastattn::cuda
