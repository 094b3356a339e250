// Tiles from global to shared memory: by cp.async where rows are made of aligned 16-byte chunks, else by element.
#pragma once

#include "cuda/matrix.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/shared.h"
#include "cuda/swizzle.h"
#include "params.h"

namespace fastattn::cuda::sm80 {

// One row, by its number in lse and its like, of q, out or one of their gradients.
template <typename T>
FASTATTN_DEVICE Matrix<T> row_matrix(const Tensor4& x, const TableRow& row, int64_t cols) {
    return {static_cast<T*>(x.data) + row.offset(x), x.stride[2], x.stride[3], 1, static_cast<int>(cols)};
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
    FASTATTN_DEVICE explicit TileLoader(const Matrix<const T>& from, int thread = thread_index())
        : thread_(thread),
          data_(from.data + row() * from.row_stride + col()),
          pass_stride_(kPass * from.row_stride),
          rows_(from.rows - row()),
          cols_(from.cols - col()) {}

    // Starts copying rows row0 .. row0 + kRows - 1 to the tile at `to`; the caller commits. row0: a multiple of kRows.
    FASTATTN_DEVICE void operator()(uint32_t to, int row0) const {
        if (kThreads / kLanes > kRows && row() >= kRows) return;
        const T* from = data_ + row0 / kPass * pass_stride_;
        to += Tile::offset(row(), thread_ % kLanes);
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
    FASTATTN_DEVICE int row() const { return thread_ / kLanes; }
    FASTATTN_DEVICE int col() const { return thread_ % kLanes * 8; }

    int thread_;
    const T* data_;  // what this thread copies of the first row
    int64_t pass_stride_;
    int rows_, cols_;  // from there on
};

template <typename T>
FASTATTN_DEVICE uint32_t read_bits(const Matrix<const T>& from, int row, int col) {
    if (row >= from.rows || col >= from.cols) return 0;
    return load_global(&from.data[row * from.row_stride + col * from.col_stride]).bits;
}

// Two neighbouring elements of a row of `cols`, where they exist.
template <typename T>
FASTATTN_DEVICE void store_pair(T* row, int64_t col_stride, int cols, int col, float low, float high) {
    if (col >= cols) return;
    T* at = row + col * col_stride;
    if (col_stride == 1 && col + 1 < cols && reinterpret_cast<uintptr_t>(at) % 4 == 0) {
        store_global(reinterpret_cast<uint32_t*>(at), pack<T>(low, high));
        return;
    }
    T element;
    from_float(low, element);
    store_global(at, element);
    if (col + 1 >= cols) return;
    from_float(high, element);
    store_global(at + col_stride, element);
}

// Eight elements of row 0 from column 8 chunk on to shared memory: by cp.async where they are an aligned chunk.
template <typename T>
FASTATTN_DEVICE void load_chunk(uint32_t to, const Matrix<const T>& from, int chunk) {
    if (from.col_stride == 1 && reinterpret_cast<uintptr_t>(from.data) % 16 == 0 && from.cols % 8 == 0) {
        cp_async<16>(to, from.data + 8 * chunk, from.rows > 0 && 8 * chunk < from.cols);
        return;
    }
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
        const int col = 8 * chunk + 2 * pair;
        store_shared(to + 4 * pair, read_bits(from, 0, col) | read_bits(from, 0, col + 1) << 16);
    }
}

// Tiles of any strides and sizes, element by element, done when it returns.
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

// Tiles of rows that lie anywhere: row(n) gives the matrix of one row, or of none, that becomes row n of the tile.
template <typename T, int kRows, int kCols, int kThreads, typename Row>
FASTATTN_DEVICE void load_rows(uint32_t to, const Row& row) {
    using Tile = SwizzledTile<kCols>;
#pragma unroll 1
    for (int n = thread_index() / 4; n < kRows; n += kThreads / 4) {
        const Matrix<const T> from = row(n);
#pragma unroll 1
        for (int chunk = thread_index() % 4; chunk < Tile::kChunks; chunk += 4) {
            load_chunk(to + Tile::offset(n, chunk), from, chunk);
        }
    }
}

}  // namespace fastattn::cuda::sm80
