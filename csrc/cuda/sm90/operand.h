// Tiles of 16-bit elements in shared memory, as the tensor memory accelerator writes and wgmma reads them.
#pragma once

#include "cuda/matrix.h"
#include "cuda/ptx/bulk_copy.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/wgmma.h"

namespace fastattn::cuda::sm90 {

// kRows x kCols, divided into spans of 64 or 32 columns; a span is kRows rows of 128 or 64 bytes in which the 16-byte
// chunks are exchanged by the hardware's swizzle. A tile starts at a multiple of 1024.
template <int kRows, int kCols, int kSpanCols = kCols % 64 == 0 ? 64 : 32>
struct Operand {
    static constexpr int kSpan = kSpanCols;
    static constexpr int kSpans = kCols / kSpan;
    static constexpr Swizzle kSwizzle = kSpan == 64 ? Swizzle::k128Bytes : Swizzle::k64Bytes;
    static constexpr uint32_t kRowBytes = 2 * kSpan, kBlockBytes = 8 * kRowBytes, kSpanBytes = kRows * kRowBytes;
    static constexpr uint32_t kBytes = kSpans * kSpanBytes;
    static_assert((kSpan == 32 || kSpan == 64) && kCols % kSpan == 0 && kRows % 16 == 0 && kRows <= 256 &&
                  kBytes % 1024 == 0);

    // Rows from row on (a multiple of 8) as m or n, columns 16 step .. 16 step + 15 as k.
    static FASTATTN_DEVICE uint64_t k_major(uint32_t tile, int row, int step) {
        constexpr int kSteps = kSpan / 16;
        return descriptor(tile + row * kRowBytes + step / kSteps * kSpanBytes + step % kSteps * 32, 0, kBlockBytes);
    }
    // Columns from col on (a multiple of the span) as m or n, rows 16 step .. 16 step + 15 as k.
    static FASTATTN_DEVICE uint64_t mn_major(uint32_t tile, int col, int step) {
        return descriptor(tile + col / kSpan * kSpanBytes + step * 2 * kBlockBytes, kSpanBytes, kBlockBytes);
    }
    // Where the chunk of columns 8 chunk .. 8 chunk + 7 of a row lies.
    static FASTATTN_DEVICE uint32_t address(uint32_t tile, int row, int chunk) {
        constexpr int kChunks = kSpan / 8;
        const uint32_t linear = tile + chunk / kChunks * kSpanBytes + row * kRowBytes + chunk % kChunks * 16;
        return linear ^ (linear >> 3 & (kSpan == 64 ? 0x70 : 0x30));
    }
    // Starts copying rows row .. row + kRows - 1 of a head, from column col on, to the tile. One thread, which has told
    // the barrier of kBytes.
    static FASTATTN_DEVICE void load(uint32_t tile, const TensorMap& map, uint32_t barrier, int row, int head,
                                     int batch, int col = 0) {
#pragma unroll
        for (int n = 0; n < kSpans; ++n) {
            tma_load(tile + n * kSpanBytes, map, barrier, col + n * kSpan, row, head, batch);
        }
    }
    // Rows from `first` on become 0; of `threads` this is number `thread`. fence_proxy_async() and a barrier follow.
    static FASTATTN_DEVICE void clear_rows(uint32_t tile, int first, int thread, int threads) {
        constexpr int kChunks = kCols / 8;
#pragma unroll 1
        for (int n = first * kChunks + thread; n < kRows * kChunks; n += threads) {
            store_shared(address(tile, n / kChunks, n % kChunks), Float4{});
        }
    }
    // The other way, for 64 rows of the tile from `first` on, of a map whose boxes have 64 rows. One thread commits.
    static FASTATTN_DEVICE void store_64(uint32_t tile, int first, const TensorMap& map, int row, int head, int batch,
                                         int col = 0) {
#pragma unroll
        for (int n = 0; n < kSpans; ++n) {
            tma_store(map, tile + n * kSpanBytes + first * kRowBytes, col + n * kSpan, row, head, batch);
        }
    }
    // The same of those of the 64 rows that `to` has, by ordinary stores of the threads of a warpgroup: behind a packed
    // sequence's last row the next one begins, which TMA would write.
    template <typename T>
    static FASTATTN_DEVICE void store_some(uint32_t tile, int first, const Matrix<T>& to) {
        constexpr int kChunks = kCols / 8;
#pragma unroll 1
        for (int n = thread_index() % 128; n < 64 * kChunks; n += 128) {
            const int row = n / kChunks, chunk = n % kChunks;
            if (row >= to.rows || 8 * chunk >= to.cols) continue;
            store_global(reinterpret_cast<Words4*>(to.data + row * to.row_stride + 8 * chunk),
                         load_shared<Words4>(address(tile, first + row, chunk)));
        }
    }

private:
    static FASTATTN_DEVICE uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
        return kSpan == 64 ? descriptor_128(address, leading, stride) : descriptor_64(address, leading, stride);
    }
};

// Row and column of a lane's accumulators within the warpgroup's 64 rows: (fragment_row + 8 h, fragment_col + 8 n + e).
FASTATTN_DEVICE int fragment_row() { return thread_index() % 128 / 32 * 16 + (thread_index() % 32 >> 2); }
FASTATTN_DEVICE int fragment_col() { return 2 * (thread_index() & 3); }

// The operand A that the accumulators of 16 columns make, rounded: those 8 step .. 8 step + 7.
template <typename T, int kCount>
FASTATTN_DEVICE void pack_operand(uint32_t (&a)[4], const float (&d)[kCount], int step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = pack<T>(d[8 * step + 2 * r], d[8 * step + 2 * r + 1]);
}

// A place in a ring of kStages buffers and the parity of its present round. A buffer's `full` barrier is waited for
// with this parity, its `empty` barrier with the opposite one, which at first counts as passed.
template <int kStages>
struct RingPlace {
    int stage = 0;
    uint32_t parity = 0;
    FASTATTN_DEVICE void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

}  // namespace fastattn::cuda::sm90
