// The products of bfloat16 attention by vdpbf16ps: each lane adds the products of two pairs to a float. In the forward
// pass weights are rounded to bfloat16; in the backward pass P and, for dK, dS; for dQ it enters as two such numbers.
// Where a NaN or inf must not be felt, the lanes of products are computed one by one.
#pragma once

#include "bfloat16.h"
#include "scores.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// A matrix X (seq x dim) of bfloat16, padded with 0, in pairs along a product's depth:
//   rows     (seq, dim/2)              pairs of columns
//   columns  (seq/panel, dim/2, panel) pairs of columns
//   panels   (dim/panel, seq/2, panel) pairs of rows
// where the last panel is as narrow as seq, a multiple of 32, and dim, a multiple of 16, allow.
struct PairMatrix {
    static constexpr int64_t kUnit = 32;
    int64_t seq = 0, dim = 0;
    Buffer<Pair> rows, columns, panels;

    int64_t padded_seq() const { return round_up(seq, kUnit); }
    int64_t padded_dim() const { return round_up(dim, kLanes<Pair>); }
    int64_t depth() const { return count_of(dim, 2); }  // pairs of columns

    void reserve(int64_t seq_, int64_t dim_, int layouts) {
        seq = seq_, dim = dim_;
        if (layouts & kRows) rows.reserve(padded_seq() * depth());
        if (layouts & kColumns) columns.reserve(padded_seq() * depth());
        if (layouts & kPanels) panels.reserve(padded_seq() / 2 * padded_dim());
    }

    bool pack(const Rows<BFloat16>& x, int64_t first, int layouts) {
        const int64_t last = std::min(first + kPackRows, padded_seq()), wide = round_up(dim, kUnit);
        uint16_t* block = scratch<Buffer<uint16_t>>().reserve(kUnit * kMaxHeadDim);
        bool non_finite = false;
        for (int64_t i = first; i < last; i += kUnit) {
            non_finite |= read_bfloat16(x, i, kUnit, seq, dim, wide, block);
            if (layouts & kRows) {
                for (int64_t r = 0; r < kUnit; ++r) {
                    std::memcpy(rows.get() + (i + r) * depth(), block + r * wide, static_cast<size_t>(depth()) * 4);
                }
            }
            for (int64_t r = 0; r < kUnit && layouts & kColumns; r += kLanes<Pair>) {
                pack_columns(block + r * wide, wide, i + r);
            }
            for (int64_t r = 0; r < kUnit && layouts & kPanels; r += 2) pack_panels(block + r * wide, wide, i + r);
        }
        return non_finite;
    }

private:
    // 16 rows, the first of them row i.
    void pack_columns(const uint16_t* from, int64_t wide, int64_t i) {
        const int64_t panel = Operand<Pair>::panel_of(i), width = Operand<Pair>::width(panel, padded_seq());
        Pair* to = columns.get() + panel * depth() + (i - panel);
        for (int64_t d = 0; d < depth(); d += kLanes<Pair>) {
            const float* pairs = reinterpret_cast<const float*>(from + 2 * d);
            if (d + kLanes<Pair> <= depth()) {
                transpose_square(pairs, wide / 2, reinterpret_cast<float*>(to + d * width), width);
                continue;
            }
            alignas(64) float square[kLanes<Pair> * kLanes<Pair>];
            transpose_square(pairs, wide / 2, square, kLanes<Pair>);
            for (int64_t n = 0; n < depth() - d; ++n) {
                std::memcpy(to + (d + n) * width, square + n * kLanes<Pair>, kVectorBytes);
            }
        }
    }

    // Rows i and i + 1.
    void pack_panels(const uint16_t* from, int64_t wide, int64_t i) {
        for (int64_t d = 0; d < padded_dim(); d += kLanes<Pair>) {
            const int64_t panel = Operand<Pair>::panel_of(d), width = Operand<Pair>::width(panel, padded_dim());
            Pair* to = panels.get() + panel * (padded_seq() / 2) + i / 2 * width + (d - panel);
            _mm512_storeu_si512(to, pairs_of(from + d, from + wide + d));
        }
    }
};

struct PairProducts {
    using T = BFloat16;
    using C = float;
    using Matrix = PairMatrix;
    using Left = cpu::FASTATTN_CPU_ISA::Left<Pair>;
    static constexpr int64_t kQueryBlock = 48, kPartRows = 2 * kTileRows, kKeyTile = 256;
    static constexpr int64_t kUnit = PairMatrix::kUnit;
    static constexpr int64_t kRowBlock = 24, kKeyRows = 96, kMostRows = 48, kQueryColumns = 256;
    using Blocks = RoundedBlocks<PairProducts>;

    struct Session {};

    static void scores(const Matrix& x, int64_t row, int64_t rows, const Matrix& y, int64_t first, int64_t c0,
                       int64_t c1, C* s, int64_t s_stride) {
        const int64_t depth = x.depth();
        multiply_columns<Pair>(rows, {x.rows.get() + row * depth, depth, 1}, y.columns.get(), y.padded_seq(), depth,
                               first, c0, c1, s, s_stride);
    }

    // sum (rows x padded dim of Y) += left (rows x depth) · Y[first .. first + depth); depth and first are even.
    static void accumulate(bool careful, Left left, int64_t rows, int64_t depth, const Matrix& y, int64_t first,
                           C* sum) {
        const int64_t dim = y.padded_dim();
        for (int64_t d = 0; d < dim; d += kPanel<Pair>) {
            const int64_t width = Operand<Pair>::width(d, dim);
            const Pair* panel = y.panels.get() + d * (y.padded_seq() / 2) + first / 2 * width;
            if (careful) {
                multiply_nonzero(rows, left, panel, width, depth / 2, sum + d, dim);
            } else {
                multiply<Pair, true>(rows, left, panel, width, depth / 2, sum + d, dim, width);
            }
        }
    }

    // The forward pass's weights, kKeyTile columns to a row.
    static int64_t weights_row(int64_t row) { return row * kKeyTile; }
    static Left weights(const uint16_t* data, int64_t column) {
        return {reinterpret_cast<const Pair*>(data + column), kKeyTile / 2, 1};
    }
    // Columns [column, column + 32) of the row that begins at `to`.
    static void put_weights(uint16_t* to, int64_t column, __m512 low, __m512 high) {
        _mm512_store_si512(to + column, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }

    struct Gradients {
        static constexpr int kRows = 2, kVectors = 2, kRowStep = 1;
        static constexpr int64_t kWidth = kQueryColumns / 2;  // pairs of queries
        Buffer<C> s_data, dp_data;
        Buffer<Pair> p, ds;          // of a block: (keys, queries / 2)
        Buffer<Pair> transposed[2];  // dS of the tile in pairs of keys, (keys / 2, queries): upper and lower halves
        void reserve() {
            s_data.reserve(kMostRows * kQueryColumns), dp_data.reserve(kMostRows * kQueryColumns);
            p.reserve(kMostRows * kWidth), ds.reserve(kMostRows * kWidth);
            for (auto& half : transposed) half.reserve(kKeyRows / 2 * kQueryColumns);
        }
        C* s() const { return s_data.get(); }
        C* dp(int64_t) const { return dp_data.get(); }
        // Two rows of 32 columns.
        void put(int64_t block, int64_t row, int64_t column, const Vector<C> (*p_)[2], const Vector<C> (*ds_)[2]) {
            const auto round = [](const Vector<C>* x) {
                return (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
            };
            for (int a = 0; a < 2; ++a) {
                const int64_t at = (row + a) * kWidth + column / 2;
                _mm512_store_si512(p.get() + at, round(p_[a]));
                _mm512_store_si512(ds.get() + at, round(ds_[a]));
            }
            for (int u = 0; u < 2; ++u) {
                const SplitPair pair(ds_[0][u], ds_[1][u]);
                const int64_t at = (block + row) / 2 * kQueryColumns + column + 16 * u;
                _mm512_store_si512(transposed[0].get() + at, pair.upper);
                _mm512_store_si512(transposed[1].get() + at, pair.lower);
            }
        }
        void clear(int64_t block, int64_t rows, int64_t c0, int64_t c1) {
            if (c0 >= c1) return;
            for (int64_t r = block; r < block + rows; r += 2) {
                for (auto& half : transposed) {
                    Pair* row = half.get() + r / 2 * kQueryColumns;
                    std::fill(row + c0, row + c1, Pair(0));
                }
            }
        }
        void add_dv(bool careful, int64_t rows, int64_t c0, int64_t c1, const Matrix& dout, int64_t first,
                    C* dv) const {
            accumulate(careful, {p.get() + c0 / 2, kWidth, 1}, rows, c1 - c0, dout, first + c0, dv);
        }
        void add_dk(bool careful, int64_t, int64_t rows, int64_t c0, int64_t c1, const Matrix& q, int64_t first,
                    C* dk) const {
            accumulate(careful, {ds.get() + c0 / 2, kWidth, 1}, rows, c1 - c0, q, first + c0, dk);
        }
        void add_dq(bool careful, int64_t keys, int64_t c0, int64_t c1, const Matrix& k, int64_t key, int64_t first,
                    C* dq) const {
            for (const auto& half : transposed) {
                accumulate(careful, {half.get() + c0, 1, kQueryColumns}, c1 - c0, round_up(keys, 2), k, key,
                           dq + (first + c0) * k.padded_dim());
            }
        }
    };
    static int64_t dq_size(int64_t seqlen_q, int64_t dim) {
        return round_up(seqlen_q, kQueryColumns) * round_up(dim, kLanes<C>);
    }
    static const C* dq_row(const C* dq, int64_t i, int64_t dim, C*) { return dq + i * round_up(dim, kLanes<C>); }
    static constexpr int kKeyLayouts = kRows | kPanels, kValueLayouts = kRows, kQueryLayouts = kColumns | kPanels;

private:
    // sum (rows x width) += left · right, passing over every zero of left.
    static void multiply_nonzero(int64_t rows, Left left, const Pair* right, int64_t width, int64_t depth, C* sum,
                                 int64_t sum_stride) {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t k = 0; k < depth; ++k) {
                const Pair pair = left.a[i * left.row + k * left.depth];
                for (const int shift : {16, 0}) {  // the lower half first
                    const C x = bits_to_float(pair << shift & 0xffff0000u);
                    if (x == 0) continue;
                    for (int64_t u = 0; u < width; ++u) {
                        sum[i * sum_stride + u] += x * bits_to_float(right[k * width + u] << shift & 0xffff0000u);
                    }
                }
            }
        }
    }
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
