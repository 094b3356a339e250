// The products of bfloat16 attention by AMX tiles: tdpbf16ps adds a 16 x 32 by 32 x 16 product to 16 x 16 floats.
// In the backward pass P and dS enter as the sum of two bfloat16 numbers, 16 bits in all, so that only inputs and
// results are rounded; in the forward pass weights are rounded to bfloat16.
#pragma once

#include <atomic>

#include "bfloat16.h"
#include "scores.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// A matrix X (seq x dim), padded with 0, in tiles of 1 KiB. Along a product's depth, elements 2n and 2n + 1 of 32 are
// the pair that one instruction lane multiplies; where the depth runs over seq, that pair is rows n and n + 16.
//   rows        (seq/16, dim/32) tiles of 16 rows by 32 columns
//   columns     (seq/16, dim/32) tiles of 16 pairs of columns by 16 rows
//   panels      (dim/16, seq/32) tiles of 16 pairs of rows by 16 columns
//   transposed  (seq/32, dim/16) tiles of 16 columns by 16 pairs of rows
struct AmxMatrix {
    static constexpr int64_t kTile = 512;  // elements
    int64_t seq = 0, dim = 0;
    Buffer<uint16_t> rows, columns, panels, transposed;

    int64_t padded_seq() const { return round_up(seq, 32); }
    int64_t padded_dim() const { return round_up(dim, 16); }
    int64_t depth() const { return round_up(dim, 32); }

    void reserve(int64_t seq_, int64_t dim_, int layouts) {
        seq = seq_, dim = dim_;
        if (layouts & kRows) rows.reserve(padded_seq() * depth());
        if (layouts & kColumns) columns.reserve(padded_seq() * depth());
        if (layouts & kPanels) panels.reserve(padded_seq() * padded_dim());
        if (layouts & kTransposed) transposed.reserve(padded_seq() * padded_dim());
    }

    bool pack(const Rows<BFloat16>& x, int64_t first, int layouts) {
        const int64_t last = std::min(first + kPackRows, padded_seq()), wide = depth();
        uint16_t* block = scratch<Buffer<uint16_t>>().reserve(32 * kMaxHeadDim);
        bool non_finite = false;
        for (int64_t i = first; i < last; i += 32) {
            non_finite |= read_bfloat16(x, i, 32, seq, dim, wide, block);
            pack_block(block, i, layouts);
        }
        return non_finite;
    }

private:
    static const float* words(const uint16_t* p) { return reinterpret_cast<const float*>(p); }
    static float* words(uint16_t* p) { return reinterpret_cast<float*>(p); }

    // 32 rows of depth() elements each, the first of them row i.
    void pack_block(const uint16_t* block, int64_t i, int layouts) {
        const int64_t wide = depth();
        for (int64_t half = 0; half < 2; ++half) {
            const uint16_t* from = block + half * 16 * wide;
            const int64_t at = (i + half * 16) * wide;
            for (int64_t d = 0; d < wide; d += 32) {
                if (layouts & kRows) {
                    for (int64_t r = 0; r < 16; ++r) {
                        std::memcpy(rows.get() + at + d * 16 + r * 32, from + r * wide + d, 64);
                    }
                }
                if (layouts & kColumns) {
                    transpose_square(words(from + d), wide / 2, words(columns.get() + at + d * 16), 16);
                }
            }
        }
        if (!(layouts & (kPanels | kTransposed))) return;
        for (int64_t d = 0; d < padded_dim(); d += 16) {
            alignas(64) uint16_t pairs[kTile];
            uint16_t* to = layouts & kPanels ? panels.get() + d * padded_seq() + i * 16 : pairs;
            for (int64_t n = 0; n < 16; ++n) {
                const uint16_t* row = block + n * wide + d;
                _mm512_storeu_si512(to + n * 32, pairs_of(row, row + 16 * wide));
            }
            if (layouts & kTransposed) {
                transpose_square(words(to), 16, words(transposed.get() + i * padded_dim() + d * 32), 16);
            }
        }
    }
};

// One operand of a product of tiles: `step` elements from one step of depth to the next, `block` to the next 16 rows
// (left) or columns (right). `rest` is what the upper halves leave, or null.
struct AmxOperand {
    const uint16_t* data;
    int64_t step, block;
    const uint16_t* rest = nullptr;
};

struct AmxProducts {
    using T = BFloat16;
    using C = float;
    using Matrix = AmxMatrix;
    static constexpr int64_t kRowBlock = 32, kMostRows = 32, kQueryBlock = 32, kPartRows = 32, kKeyTile = 256,
                             kUnit = 32;
    static constexpr int64_t kKeyRows = 128, kQueryColumns = 256;
    static constexpr int64_t kTile = AmxMatrix::kTile;
    using Blocks = RoundedBlocks<AmxProducts>;
    using Left = AmxOperand;

    struct Session {
        Session() {
            struct alignas(64) Config {
                uint8_t palette = 1, start = 0, reserved[14] = {};
                uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            };
            static const Config config;
            _tile_loadconfig(&config);
        }
        ~Session() { _tile_release(); }
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
    };

    // Where an element of a block of left-hand operands, `width` columns to a row, lies in its tiles.
    static int64_t at(int64_t row, int64_t column, int64_t width) {
        return row / 16 * 16 * width + column / 32 * kTile + row % 16 * 32;
    }

    // The forward pass's weights, kKeyTile columns to a row, rounded to nearest (what lies between two, away from 0).
    static int64_t weights_row(int64_t row) { return at(row, 0, kKeyTile); }
    static Left weights(const uint16_t* data, int64_t column) { return {data + column * 16, kTile, 16 * kKeyTile}; }
    // Columns [column, column + 32) of the row that begins at `to`.
    static void put_weights(uint16_t* to, int64_t column, __m512 low, __m512 high) {
        const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low), half),
                      b = _mm512_add_epi32(_mm512_castps_si512(high), half);
        _mm512_store_si512(to + column / 32 * kTile,
                           _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, upper, 0xf8));
    }

    static void scores(const Matrix& x, int64_t row, int64_t rows, const Matrix& y, int64_t first, int64_t c0,
                       int64_t c1, C* s, int64_t s_stride) {
        const int64_t depth = x.depth();
        const AmxOperand left{x.rows.get() + row * depth, kTile, 16 * depth};
        for (int64_t c = c0; c < c1; c += 32) {
            product(left, {y.columns.get() + (first + c) * depth, kTile, 16 * depth}, depth / 32, rows > 16, true,
                    s + c, s_stride, false);
        }
    }

    struct Gradients {
        static constexpr int kRows = 2, kVectors = 2, kRowStep = 16;
        static constexpr int64_t kSize = kRowBlock * kQueryColumns;
        Buffer<uint16_t> memory;
        Buffer<C> s_data, dp_data;
        uint16_t *p[2], *ds[2];  // of a block, as left-hand operands: upper and lower halves
        uint16_t* right[2];      // dS of the tile, as right-hand operand: (keys/32, queries/16) tiles
        C* s() const { return s_data.get(); }
        C* dp(int64_t) const { return dp_data.get(); }
        void reserve() {
            s_data.reserve(kSize), dp_data.reserve(kSize);
            uint16_t* at = memory.reserve(4 * kSize + 2 * kKeyRows * kQueryColumns);
            for (uint16_t** to : {p, ds}) to[0] = at, to[1] = at + kSize, at += 2 * kSize;
            right[0] = at, right[1] = at + kKeyRows * kQueryColumns;
        }
        void put(int64_t block, int64_t row, int64_t column, const Vector<C> (*p_)[2], const Vector<C> (*ds_)[2]) {
            for (int a = 0; a < 2; ++a) {
                const int64_t at = AmxProducts::at(row + 16 * a, column, kQueryColumns);
                store_pair(p, at, {p_[a][0], p_[a][1]});
                store_pair(ds, at, {ds_[a][0], ds_[a][1]});
            }
            for (int u = 0; u < 2; ++u) {
                const int64_t at = block * kQueryColumns + (column + 16 * u) * 32 + row * 32;
                store_pair(right, at, {ds_[0][u], ds_[1][u]});
            }
        }
        static void store_pair(uint16_t** to, int64_t at, const SplitPair& pair) {
            _mm512_store_si512(to[0] + at, pair.upper);
            _mm512_store_si512(to[1] + at, pair.lower);
        }
        void clear(int64_t block, int64_t, int64_t c0, int64_t c1) {
            if (c0 >= c1) return;
            for (uint16_t* half : right) {
                uint16_t* from = half + block * kQueryColumns;
                std::fill(from + c0 * 32, from + c1 * 32, uint16_t(0));
            }
        }
        void add_dv(bool careful, int64_t rows, int64_t c0, int64_t c1, const Matrix& dout, int64_t first,
                    C* dv) const {
            accumulate(careful, {p[0] + c0 * 16, kTile, 16 * kQueryColumns, p[1] + c0 * 16}, rows, c1 - c0, dout,
                       first + c0, dv);
        }
        void add_dk(bool careful, int64_t, int64_t rows, int64_t c0, int64_t c1, const Matrix& q, int64_t first,
                    C* dk) const {
            accumulate(careful, {ds[0] + c0 * 16, kTile, 16 * kQueryColumns, ds[1] + c0 * 16}, rows, c1 - c0, q,
                       first + c0, dk);
        }
        // dqᵀ += Kᵀ[key .. key + keys) · dSᵀ: dq holds (queries / kQueryColumns, dim, kQueryColumns).
        void add_dq(bool careful, int64_t keys, int64_t c0, int64_t c1, const Matrix& k, int64_t key, int64_t first,
                    C* dq) const {
            const int64_t dim = k.padded_dim(), steps = count_of(keys, 32);
            C* to = dq + first * dim;
            if (careful) return add_dq_carefully(keys, c0, c1, k, key, to);
            for (int64_t d = 0; d < dim; d += 32) {
                const AmxOperand left{k.transposed.get() + key * dim + d * 32, 32 * dim, kTile};
                for (int64_t c = c0; c < c1; c += 32) {
                    const AmxOperand ds_right{right[0] + c * 32, 32 * kQueryColumns, kTile, right[1] + c * 32};
                    product(left, ds_right, steps, d + 16 < dim, true, to + d * kQueryColumns + c, kQueryColumns, true);
                }
            }
        }
        void add_dq_carefully(int64_t keys, int64_t c0, int64_t c1, const Matrix& k, int64_t key, C* to) const {
            for (int64_t j = 0; j < keys; ++j) {
                for (int64_t c = c0; c < c1; ++c) {
                    const int64_t at =
                        j / 32 * 32 * kQueryColumns + c / 16 * kTile + j % 16 * 32 + c % 16 * 2 + j % 32 / 16;
                    const C x =
                        bits_to_float(uint32_t(right[0][at]) << 16) + bits_to_float(uint32_t(right[1][at]) << 16);
                    if (x == 0) continue;
                    for (int64_t d = 0; d < k.dim; ++d) {
                        const int64_t from = (key + j) / 32 * 32 * k.padded_dim() + d * 32 + j % 16 * 2 + j % 32 / 16;
                        to[d * kQueryColumns + c] += x * bits_to_float(uint32_t(k.transposed.get()[from]) << 16);
                    }
                }
            }
        }
    };
    static int64_t dq_size(int64_t seqlen_q, int64_t dim) {
        return round_up(seqlen_q, kQueryColumns) * round_up(dim, 16);
    }
    static const C* dq_row(const C* dq, int64_t i, int64_t dim, C* row) {
        const C* from = dq + i / kQueryColumns * kQueryColumns * round_up(dim, 16) + i % kQueryColumns;
        for (int64_t d = 0; d < dim; ++d) row[d] = from[d * kQueryColumns];
        return row;
    }
    static constexpr int kKeyLayouts = kRows | kTransposed, kValueLayouts = kRows, kQueryLayouts = kColumns | kPanels;

    // sum (rows x padded dim of Y) += left (rows x depth) · Y[first .. first + depth).
    static void accumulate(bool careful, const AmxOperand& left, int64_t rows, int64_t depth, const Matrix& y,
                           int64_t first, C* sum) {
        if (careful) return accumulate_carefully(left, rows, depth, y, first, sum);
        const int64_t dim = y.padded_dim();
        for (int64_t d = 0; d < dim; d += 32) {
            const AmxOperand right{y.panels.get() + d * y.padded_seq() + first * 16, kTile, 16 * y.padded_seq()};
            product(left, right, depth / 32, rows > 16, d + 16 < dim, sum + d, dim, true);
        }
    }

private:
    // The same, passing over every zero on the left: an unseen NaN or inf in Y then has no part in the sum.
    static void accumulate_carefully(const AmxOperand& left, int64_t rows, int64_t depth, const Matrix& y,
                                     int64_t first, C* sum) {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t k = 0; k < depth; ++k) {
                const int64_t at = i / 16 * left.block + k / 32 * left.step + i % 16 * 32 + k % 16 * 2 + k % 32 / 16;
                C x = bits_to_float(uint32_t(left.data[at]) << 16);
                if (left.rest != nullptr) x += bits_to_float(uint32_t(left.rest[at]) << 16);
                if (x == 0) continue;
                for (int64_t d = 0; d < y.dim; ++d) {
                    const int64_t from = d / 16 * 16 * y.padded_seq() + (first + k) / 32 * kTile + k % 16 * 32 +
                                         d % 16 * 2 + k % 32 / 16;
                    sum[i * y.padded_dim() + d] += x * bits_to_float(uint32_t(y.panels.get()[from]) << 16);
                }
            }
        }
    }

    static void product(const AmxOperand& left, const AmxOperand& right, int64_t steps, bool two_rows, bool two_columns,
                        C* c, int64_t c_stride, bool add) {
        if (two_rows) {
            two_columns ? product<true, true>(left, right, steps, c, c_stride, add)
                        : product<true, false>(left, right, steps, c, c_stride, add);
        } else {
            two_columns ? product<false, true>(left, right, steps, c, c_stride, add)
                        : product<false, false>(left, right, steps, c, c_stride, add);
        }
    }

    // Tiles 0 to 3: sums, row by row; 4, 5: left; 6, 7: right.
    template <bool two_rows, bool two_columns>
    __attribute__((always_inline)) static void multiply_add() {
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) _tile_dpbf16ps(1, 4, 7);
        if (two_rows) _tile_dpbf16ps(2, 5, 6);
        if (two_rows && two_columns) _tile_dpbf16ps(3, 5, 7);
    }
    template <bool two>
    __attribute__((always_inline)) static void load_left(const uint16_t* data, int64_t block) {
        _tile_loadd(4, data, 64);
        if (two) _tile_loadd(5, data + block, 64);
    }
    template <bool two>
    __attribute__((always_inline)) static void load_right(const uint16_t* data, int64_t block) {
        _tile_loadd(6, data, 64);
        if (two) _tile_loadd(7, data + block, 64);
    }

    template <bool two_rows, bool two_columns>
    static void product(const AmxOperand& left, const AmxOperand& right, int64_t steps, C* c, int64_t c_stride,
                        bool add) {
        const int64_t bytes = c_stride * 4;
        C* below = c + 16 * c_stride;
        std::atomic_signal_fence(std::memory_order_seq_cst);  // tile loads are not known to read memory
        if (add) {
            _tile_loadd(0, c, bytes);
            if (two_columns) _tile_loadd(1, c + 16, bytes);
            if (two_rows) _tile_loadd(2, below, bytes);
            if (two_rows && two_columns) _tile_loadd(3, below + 16, bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t k = 0; k < steps; ++k) {
            load_right<two_columns>(right.data + k * right.step, right.block);
            load_left<two_rows>(left.data + k * left.step, left.block);
            multiply_add<two_rows, two_columns>();
            if (left.rest != nullptr) {
                load_left<two_rows>(left.rest + k * left.step, left.block);
                multiply_add<two_rows, two_columns>();
            } else if (right.rest != nullptr) {
                load_right<two_columns>(right.rest + k * right.step, right.block);
                multiply_add<two_rows, two_columns>();
            }
        }
        _tile_stored(0, c, bytes);
        if (two_columns) _tile_stored(1, c + 16, bytes);
        if (two_rows) _tile_stored(2, below, bytes);
        if (two_rows && two_columns) _tile_stored(3, below + 16, bytes);
    }
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
