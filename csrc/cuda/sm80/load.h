// Tiles from global to shared memory: by cp.async where rows are made of aligned 16-byte chunks, else by element.
#pragma once

#include "cuda/ptx/convert.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/shared.h"
#include "cuda/swizzle.h"
#include "params.h"

namespace fastattn::cuda::sm80 {

// The (seq, head_dim) matrix of one head; rows and columns beyond its size read as 0.
template <typename T>
struct Matrix {
    T* data;
    int64_t row_stride, col_stride;
    int rows, cols;
};

template <typename T>
FASTATTN_DEVICE Matrix<T> head_matrix(const Tensor4& x, int64_t b, int64_t h, int64_t rows, int64_t cols) {
    return {static_cast<T*>(x.data) + b * x.stride[0] + h * x.stride[1], x.stride[2], x.stride[3],
            static_cast<int>(rows), static_cast<int>(cols)};
}

// Whether rows can be read and written in aligned chunks of 16 bytes.
template <typename T>
FASTATTN_DEVICE bool in_chunks(const Matrix<T>& x) {
    return x.col_stride == 1 && x.cols % 8 == 0 && x.row_stride % 8 == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Copies tiles of kRows rows of one matrix with kThreads threads. A thread copies the same chunks of every tile, so
// that what depends on the thread is computed once.
template <typename T, int kRows, int kCols, int kThreads>
class TileLoader {
    using Tile = SwizzledTile<kCols>;
    static constexpr int kLanes = Tile::kChunks % 8 == 0 ? 8 : 4;  // threads side by side in a row
    static constexpr int kPass = kThreads / kLanes < kRows ? kThreads / kLanes : kRows;  // rows at a time
    static_assert(Tile::kChunks % kLanes == 0 && kRows % kPass == 0 && kPass % 8 == 0);

public:
    FASTATTN_DEVICE explicit TileLoader(const Matrix<const T>& from)
        : data_(from.data + row() * from.row_stride + col()),
          pass_stride_(kPass * from.row_stride),
          rows_(from.rows - row()),
          cols_(from.cols - col()) {}

    // Starts copying rows row0 .. row0 + kRows - 1 to the tile at `to`; the caller commits. row0: a multiple of kRows.
    FASTATTN_DEVICE void operator()(uint32_t to, int row0) const {
        if (kThreads / kLanes > kRows && row() >= kRows) return;
        const T* from = data_ + row0 / kPass * pass_stride_;
        to += Tile::offset(row(), thread_index() % kLanes);
#pragma unroll
        for (int r = 0; r < kRows; r += kPass) {
#pragma unroll
            for (int c = 0; c < Tile::kChunks; c += kLanes) {
                cp_async<16>(to + Tile::bytes(r) + c * 16, from + c * 8, row0 + r < rows_ && c * 8 < cols_);
            }
            from += pass_stride_;
        }
    }

private:
    static FASTATTN_DEVICE int row() { return thread_index() / kLanes; }
    static FASTATTN_DEVICE int col() { return thread_index() % kLanes * 8; }

    const T* data_;  // what this thread copies of the first row
    int64_t pass_stride_;
    int rows_, cols_;  // from there on
};

template <typename T>
FASTATTN_DEVICE uint32_t read_bits(const Matrix<const T>& from, int row, int col) {
    if (row >= from.rows || col >= from.cols) return 0;
    return load_global(&from.data[row * from.row_stride + col * from.col_stride]).bits;
}

// The same for any strides and sizes, element by element, done when it returns.
template <typename T, int kRows, int kCols, int kThreads>
FASTATTN_DEVICE void load_elements(uint32_t to, const Matrix<const T>& from, int row0) {
    const bool along_row = from.col_stride == 1;  // neighbouring threads follow the contiguous dimension
    constexpr int kPairs = kCols / 2;
#pragma unroll 1
    for (int n = thread_index(); n < kRows * kPairs; n += kThreads) {
        const int row = along_row ? n / kPairs : n % kRows;
        const int pair = along_row ? n % kPairs : n / kRows;
        const uint32_t low = read_bits(from, row0 + row, 2 * pair), high = read_bits(from, row0 + row, 2 * pair + 1);
        store_shared(to + SwizzledTile<kCols>::offset(row, pair / 4) + pair % 4 * 4, low | high << 16);
    }
}

}  // namespace fastattn::cuda::sm80
