// 64 x 64 tiles of a matrix product, without tensor cores.
//
// 256 threads as 16 x 16: thread (ty, tx) holds rows 4 ty .. 4 ty + 3 and columns 4 tx .. 4 tx + 3 of a tile in
// registers. Both operands of a product lie in shared memory with the summed dimension first, x[k][row] and
// y[k][column], kInner of it at a time: any head dimension passes through the same 35 KiB.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/matrix.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/global.h"
#include "cuda/ptx/shared.h"
#include "params.h"

namespace fastattn::cuda::simt {

constexpr int kBlock = 64;          // queries or keys of a tile
constexpr int kThreads = 256;       // of a block
constexpr int kInner = 32;          // of the summed dimension in shared memory at a time
constexpr int kPitch = kBlock + 4;  // floats from row to row in shared memory, 16-byte aligned

using Accumulator = float[4][4];

struct alignas(16) Vector4 {
    float at[4];
};

// Matrices of floats in shared memory, kPitch apart from row to row.
constexpr uint32_t kX = 0;                                            // kInner rows
constexpr uint32_t kY = kX + kInner * kPitch * sizeof(float);         // kInner rows
constexpr uint32_t kExchange = kY + kInner * kPitch * sizeof(float);  // kBlock rows: P or dS on its way to an operand
constexpr int kSharedBytes = kExchange + kBlock * kPitch * sizeof(float);

FASTATTN_DEVICE uint32_t at(uint32_t matrix, int row, int col) {
    return matrix + static_cast<uint32_t>(row * kPitch + col) * sizeof(float);
}

FASTATTN_DEVICE int ty() { return thread_index() / 16; }
FASTATTN_DEVICE int tx() { return thread_index() % 16; }

template <typename T>
FASTATTN_DEVICE float read(const Matrix<T>& m, int row, int col) {
    return row < m.rows && col < m.cols ? to_float(load_global(&m.data[row * m.row_stride + col * m.col_stride])) : 0.f;
}

// x[k][row] = m[row][k] for kBlock rows and kInner columns. Neighbouring threads follow the contiguous dimension.
template <typename T>
FASTATTN_DEVICE void load_transposed(uint32_t x, const Matrix<T>& m) {
    const bool along_row = m.col_stride == 1;
#pragma unroll 2
    for (int n = 0; n < kBlock * kInner / kThreads; ++n) {
        const int e = n * kThreads + thread_index();
        const int row = along_row ? e / kInner : e % kBlock;
        const int col = along_row ? e % kInner : e / kBlock;
        store_shared(at(x, col, row), read(m, row, col));
    }
}

// y[k][column] = m[k][column] for kInner rows and kBlock columns; whether all that this thread read is finite.
template <typename T>
FASTATTN_DEVICE bool load(uint32_t y, const Matrix<T>& m) {
    const bool along_row = m.col_stride == 1;
    bool finite = true;
#pragma unroll 2
    for (int n = 0; n < kBlock * kInner / kThreads; ++n) {
        const int e = n * kThreads + thread_index();
        const int row = along_row ? e / kBlock : e % kInner;
        const int col = along_row ? e % kBlock : e / kInner;
        const float value = read(m, row, col);
        finite = finite && fabsf(value) <= FLT_MAX;
        store_shared(at(y, row, col), value);
    }
    return finite;
}

// acc[r][c] += sum_k x[k][4 ty + r] y[k][4 tx + c].
//
// HAZARD: an entry of P or dS that is 0 because its key is invisible still meets that key's row of y, and
// 0 * NaN = NaN. Such entries are stored as -0, which no visible entry is, and left out where kSkipInvisible.
template <bool kSkipInvisible>
FASTATTN_DEVICE void multiply(Accumulator& acc, uint32_t x, uint32_t y) {
#pragma unroll 4
    for (int k = 0; k < kInner; ++k) {
        const Vector4 a = load_shared<Vector4>(at(x, k, 4 * ty()));
        const Vector4 b = load_shared<Vector4>(at(y, k, 4 * tx()));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            if (kSkipInvisible && float_bits(a.at[r]) == 0x80000000u) continue;
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[r][c] += a.at[r] * b.at[c];
        }
    }
}

// acc = a b^T: scores from queries and keys, dP from dO and values. All threads of the block call it.
template <typename T>
FASTATTN_DEVICE void dot_rows(Accumulator& acc, const Matrix<const T>& a, const Matrix<const T>& b) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[r][c] = 0.f;
    }
    for (int k = 0; k < a.cols; k += kInner) {
        barrier();
        load_transposed(smem_base() + kX, a.from(0, k));
        load_transposed(smem_base() + kY, b.from(0, k));
        barrier();
        multiply<false>(acc, smem_base() + kX, smem_base() + kY);
    }
}

// exchange[row][column] = tile, or its transpose.
template <bool kTranspose>
FASTATTN_DEVICE void store_exchange(const Accumulator& tile) {
    barrier();
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        Vector4 line;
#pragma unroll
        for (int m = 0; m < 4; ++m) line.at[m] = kTranspose ? tile[m][n] : tile[n][m];
        const int row = (kTranspose ? 4 * tx() : 4 * ty()) + n, col = kTranspose ? 4 * ty() : 4 * tx();
        store_shared(at(smem_base() + kExchange, row, col), line);
    }
}

// acc[chunk] += exchange^T y[:, 64 chunk ..] for kBlock rows of y: P V, P^T dO, dS K, dS^T Q.
template <int kChunks, typename T>
FASTATTN_DEVICE void accumulate(Accumulator (&acc)[kChunks], const Matrix<const T>& y) {
#pragma unroll 1
    for (int k = 0; k < kBlock; k += kInner) {
        if (k >= y.rows) break;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            if (chunk * kBlock >= y.cols) break;
            barrier();
            const bool finite = load(smem_base() + kY, y.from(k, chunk * kBlock));
            if (barrier_or(!finite)) {
                multiply<true>(acc[chunk], at(smem_base() + kExchange, k, 0), smem_base() + kY);
            } else {
                multiply<false>(acc[chunk], at(smem_base() + kExchange, k, 0), smem_base() + kY);
            }
        }
    }
}

template <int kChunks>
FASTATTN_DEVICE void clear(Accumulator (&acc)[kChunks]) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int e = 0; e < 16; ++e) acc[chunk][e / 4][e % 4] = 0.f;
    }
}

// to[row][column] = factor[r] * acc, for the rows and columns that exist.
template <int kChunks, typename T>
FASTATTN_DEVICE void write(const Matrix<T>& to, const Accumulator (&acc)[kChunks], const float (&factor)[4]) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int e = 0; e < 16; ++e) {
            const int r = e / 4, row = 4 * ty() + r, col = chunk * kBlock + 4 * tx() + e % 4;
            if (row < to.rows && col < to.cols) {
                T value;
                from_float(acc[chunk][r][e % 4] * factor[r], value);
                store_global(&to.data[row * to.row_stride + col * to.col_stride], value);
            }
        }
    }
}

}  // namespace fastattn::cuda::simt
