// Tiles of 16-bit elements in shared memory, laid out so that no access of the kernels meets a bank conflict.
#pragma once

#include <cstdint>

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// Rows of kCols elements, in chunks of 16 bytes. Chunk c of row r lies at chunk c ^ x(r) of the row, with x such that
// eight consecutive rows of one c, which is what a phase of ldmatrix reads, lie in eight different groups of four
// banks. With n chunks a row, row r starts at group n r mod 8, so x counts rows that start at the same group:
//
//     n = 0 mod 8: all rows do, x = r mod 8;   4 mod 8: every second, x = r/2 mod 4;   2 mod 8: every fourth
template <int kCols>
struct SwizzledTile {
    static_assert(kCols % 16 == 0);
    static constexpr int kChunks = kCols / 8;
    static constexpr uint32_t kRowBytes = 2 * kCols;

    // Bytes from the start of the tile, which is aligned to 128 bytes.
    static FASTATTN_DEVICE uint32_t offset(uint32_t row, uint32_t chunk) {
        return row * kRowBytes + ((chunk ^ ((row >> kShift) & (kSpan - 1))) << 4);
    }
    // The address `chunks` chunks further in the row, where adding them to the chunk number carries no bit within the
    // exchanged ones: one exclusive or with a constant.
    static FASTATTN_DEVICE uint32_t advance(uint32_t address, int chunks) {
        return (address ^ ((chunks & (kSpan - 1)) << 4)) + chunks / kSpan * kSpan * 16;
    }
    static FASTATTN_DEVICE constexpr uint32_t bytes(int rows) { return rows * kRowBytes; }

private:
    static constexpr int kSpan = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;  // chunks that change places
    static constexpr int kShift = kChunks % 8 == 0 ? 0 : kChunks % 4 == 0 ? 1 : 2;
};

}  // namespace fastattn::cuda
