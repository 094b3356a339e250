// Scratch memory, and the dense operands that vector products read, in the compute type.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "convert.h"
#include "product.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

constexpr int64_t kMaxHeadDim = 576;
constexpr int64_t kMaxTileColumns = 512;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t count_of(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// Aligned scratch memory that grows and never shrinks while it lives. Uninitialised.
template <typename C>
class Buffer {
public:
    C* reserve(int64_t n) {
        if (n > size_) {
            data_.reset(static_cast<C*>(std::aligned_alloc(64, round_up(n * static_cast<int64_t>(sizeof(C)), 64))));
            size_ = data_ ? n : 0;
            if (!data_) throw std::bad_alloc();
        }
        return data_.get();
    }
    C* get() const { return data_.get(); }

private:
    struct Free {
        void operator()(C* p) const { std::free(p); }
    };
    std::unique_ptr<C, Free> data_;
    int64_t size_ = 0;
};

// Scratch memory of the calling thread, kept from call to call: what a short call cannot afford is fresh pages.
template <typename Tile>
Tile& scratch() {
    static thread_local Tile tile;
    return tile;
}

// 1 when all exponent bits are set: inf or NaN. In integers, so that loops over it become vector code.
template <typename C>
inline typename Exp2<C>::Integer is_non_finite(C x) {
    using I = typename Exp2<C>::Integer;
    constexpr I kExponent = (2 * Exp2<C>::kExponentBias + 1) << Exp2<C>::kMantissa;
    I bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits & kExponent) == kExponent;
}

// to[j * to_stride + i] = from[i * from_stride + j] for a square of kLanes elements.
template <typename C>
inline void transpose_square(const C* from, int64_t from_stride, C* to, int64_t to_stride) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {
        __m512 x[16], y[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {
            const __m512d a = _mm512_castps_pd(y[i]), b = _mm512_castps_pd(y[i + 1]);
            const __m512d c = _mm512_castps_pd(y[i + 2]), d = _mm512_castps_pd(y[i + 3]);
            x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        // x[4g + c] holds columns c, c+4, c+8, c+12 (one per 128-bit part) of rows 4g .. 4g+3.
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const __m512 low = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x88);
            const __m512 high = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xdd);
            const __m512 low2 = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x88);
            const __m512 high2 = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xdd);
            _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(low, low2, 0x88));
            _mm512_storeu_ps(to + (c + 4) * to_stride, _mm512_shuffle_f32x4(high, high2, 0x88));
            _mm512_storeu_ps(to + (c + 8) * to_stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
            _mm512_storeu_ps(to + (c + 12) * to_stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
        }
        return;
    }
#endif
    for (int i = 0; i < kLanes<C>; ++i) {
        for (int j = 0; j < kLanes<C>; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
}

// The layouts in which a head's (seq x dim) matrix X enters a product.
enum Layout : int {
    kRows = 1,        // X, left-hand
    kColumns = 2,     // Xᵀ, right-hand: the product runs over dim
    kPanels = 4,      // X, right-hand: the product runs over seq
    kTransposed = 8,  // Xᵀ, left-hand: the product runs over seq
};

constexpr int64_t kPackRows = 64;  // rows packed as one piece of work: a multiple of every panel width

// kLanes rows of x from row i on, in the compute type, `stride` apart: where they lie, if they are whole, or in `copy`.
// Rows from `rows` on, and columns from dim on to a whole vector, are 0.
template <typename C, typename T>
inline const C* read_lanes(const Rows<T>& x, int64_t i, int64_t rows, int64_t dim, C* copy, int64_t& stride) {
    stride = round_up(dim, kLanes<C>);
    if constexpr (std::is_same_v<T, C>) {
        if (x.dim == 1 && x.pages == nullptr && dim == stride && rows >= kLanes<C>) {
            stride = x.row;
            return x.at(i);
        }
    }
    for (int64_t r = 0; r < kLanes<C>; ++r) {
        C* row = copy + r * stride;
        const int64_t n = r < rows ? dim : 0;
        if (n > 0) read_row(x.at(i + r), x.dim, n, row);
        std::fill(row + n, row + stride, C(0));
    }
    return copy;
}

// Operands of products by vector multiply-add, in the compute type, padded with 0 to whole vectors:
//   rows    (seq, dim)
//   columns (seq / panel, dim, panel)
//   panels  (dim / panel, seq, panel)
// where the last panel is as narrow as whole vectors allow. A left-hand Xᵀ is read from rows by its strides.
template <typename C>
struct Operand {
    int64_t seq = 0, dim = 0;
    Buffer<C> rows, columns, panels;
    const C *row_data = nullptr, *panel_data = nullptr;  // where products read: these buffers, or the tensor itself

    int64_t padded_seq() const { return round_up(seq, kLanes<C>); }
    int64_t padded_dim() const { return round_up(dim, kLanes<C>); }
    // The panel that holds column i of a right-hand operand `padded` columns wide: its first column, its width.
    static int64_t panel_of(int64_t i) { return i / kPanel<C> * kPanel<C>; }
    static int64_t width(int64_t panel, int64_t padded) { return std::min<int64_t>(kPanel<C>, padded - panel); }

    void reserve(int64_t seq_, int64_t dim_, int layouts) {
        seq = seq_, dim = dim_;
        if (layouts & (kRows | kTransposed)) row_data = rows.reserve(seq * dim);
        if (layouts & kColumns) columns.reserve(padded_seq() * dim);
        if (layouts & kPanels) panel_data = panels.reserve(padded_seq() * padded_dim());
    }

    // After reserve: lets products read x where it lies, in those layouts in which it does; returns the others.
    template <typename T>
    int read_in_place(const Rows<T>& x, int layouts) {
        if constexpr (std::is_same_v<T, C>) {
            if (x.dim != 1 || x.row != dim || x.pages != nullptr) return layouts;
            if (layouts & kRows) row_data = x.data, layouts &= ~kRows;
            if (layouts & kPanels && dim <= kPanel<C> && dim == padded_dim()) panel_data = x.data, layouts &= ~kPanels;
        }
        return layouts;
    }

    // Packs rows [first, first + kPackRows) of the head; returns whether they hold inf or NaN.
    template <typename T>
    bool pack(const Rows<T>& x, int64_t first, int layouts) {
        constexpr int64_t kBlock = kLanes<C>;
        const int64_t last = std::min(first + kPackRows, padded_seq()), padded = padded_dim();
        C* copy = scratch<Buffer<C>>().reserve(kBlock * (kMaxHeadDim + kLanes<C>));
        Vector<C> zeros = {};  // but NaN where inf or NaN was met
        for (int64_t i = first; i < last; i += kBlock) {
            int64_t stride;
            const C* block = read_lanes(x, i, seq - i, dim, copy, stride);
            for (int64_t r = 0; r < kBlock; ++r) {
                const C* row = block + r * stride;
                for (int64_t d = 0; d < padded; d += kBlock) zeros += load<C>(row + d) * splat<C>(0);
                if (i + r < seq && layouts & (kRows | kTransposed))
                    std::copy(row, row + dim, rows.get() + (i + r) * dim);
                if (layouts & kPanels) {
                    for (int64_t d = 0; d < padded; d += kPanel<C>) {
                        const int64_t w = width(d, padded);
                        C* to = panels.get() + d * padded_seq() + (i + r) * w;
                        for (int64_t e = 0; e < w; e += kBlock) store<C>(to + e, load<C>(row + d + e));
                    }
                }
            }
            if (layouts & kColumns) {
                const int64_t panel = panel_of(i), w = width(panel, padded_seq());
                C* to = columns.get() + panel * dim + (i - panel);
                int64_t d = 0;
                for (; d + kBlock <= dim; d += kBlock) transpose_square(block + d, stride, to + d * w, w);
                for (; d < dim; ++d) {
                    for (int64_t r = 0; r < kBlock; ++r) to[d * w + r] = block[r * stride + d];
                }
            }
        }
        return !(sum_of<C>(zeros) == 0);
    }
};

// s (rows x [c0, c1)) = left (rows x depth) · Yᵀ, columns counted from Y's row `first`, at s + column; y: Y's
// `columns`.
template <typename E, typename C>
inline void multiply_columns(int64_t rows, Left<E> left, const E* y, int64_t padded_seq, int64_t depth, int64_t first,
                             int64_t c0, int64_t c1, C* s, int64_t s_stride, Ahead* ahead = nullptr) {
    for (int64_t c = c0; c < c1;) {
        const int64_t panel = Operand<E>::panel_of(first + c), w = Operand<E>::width(panel, padded_seq);
        const int64_t end = std::min(c1, panel + w - first);
        multiply<E, false>(rows, left, y + panel * depth + (first + c - panel), w, depth, s + c, s_stride, end - c,
                           ahead);
        c = end;
    }
}

template <typename P>
class BlocksInTurn;  // softmax.h

// The products of attention by vector multiply-add. T is the tensors' type, C the type of scores and sums.
template <typename T_, typename C_>
struct VectorProducts {
    using T = T_;
    using C = C_;
    using Matrix = Operand<C>;
    static constexpr int64_t kQueryBlock = 8 * kTileRows, kKeyTile = 128;  // forward: scores stay in the nearest cache
    // Rows of a block of the forward pass that see different keys: the fewer, the less is computed in vain.
    static constexpr int64_t kPartRows = 2 * kTileRows;
    static constexpr int64_t kRowBlock = 4 * kTileRows;   // backward: rows that are seen or not
    static constexpr int64_t kUnit = kLanes<C>;           // columns of scores are made by this many
    static constexpr int64_t kKeyRows = 16 * kTileRows;   // backward: keys of a tile
    static constexpr int64_t kMostRows = 16 * kTileRows;  // backward: rows of a block seen by all
    static constexpr int64_t kQueryColumns = 64;          // backward: queries of a tile, one panel

    // Runs once in a thread before and after its products.
    struct Session {};
    using Blocks = BlocksInTurn<VectorProducts>;

    // s (rows x [c0, c1)) = X[row .. row + rows) · Yᵀ, columns counted from Y's row `first`, at s + column.
    static void scores(const Matrix& x, int64_t row, int64_t rows, const Matrix& y, int64_t first, int64_t c0,
                       int64_t c1, C* s, int64_t s_stride, Ahead* ahead = nullptr) {
        multiply_columns<C>(rows, {x.row_data + row * x.dim, x.dim, 1}, y.columns.get(), y.padded_seq(), y.dim, first,
                            c0, c1, s, s_stride, ahead);
    }

    // sum (rows x padded dim of Y) += left (rows x depth) · Y[first .. first + depth).
    static void accumulate(bool careful, int64_t rows, Left<C> left, const Matrix& y, int64_t first, int64_t depth,
                           C* sum, Ahead* ahead = nullptr) {
        const int64_t dim = y.padded_dim();
        for (int64_t d = 0; d < dim; d += kPanel<C>) {
            const int64_t w = Matrix::width(d, dim);
            const C* panel = y.panel_data + d * y.padded_seq() + first * w;
            if (careful) {
                multiply_nonzero<C>(rows, left, panel, w, depth, sum + d, dim, w);
            } else {
                multiply<C, true>(rows, left, panel, w, depth, sum + d, dim, w, ahead);
            }
        }
    }

    // Backward, one tile of keys (rows) by queries (columns): P ∘ D of a block, dS of the whole tile, and dQ of a head.
    struct Gradients {
        static constexpr int kRows = 1, kVectors = 1, kRowStep = 1;
        Buffer<C> p_data, ds_data;
        void reserve() { p_data.reserve(kMostRows * kQueryColumns), ds_data.reserve(kKeyRows * kQueryColumns); }
        // Where scores and dP of a block are computed: P and dS take their places.
        C* s() const { return p_data.get(); }
        C* dp(int64_t block) const { return ds_data.get() + block * kQueryColumns; }
        void put(int64_t block, int64_t row, int64_t column, const Vector<C> (*p)[1], const Vector<C> (*ds)[1]) {
            store<C>(p_data.get() + row * kQueryColumns + column, p[0][0]);
            store<C>(ds_data.get() + (block + row) * kQueryColumns + column, ds[0][0]);
        }
        void clear(int64_t block, int64_t rows, int64_t c0, int64_t c1) {
            for (int64_t r = 0; r < rows; ++r) {
                C* row = ds_data.get() + (block + r) * kQueryColumns;
                std::fill(row + c0, row + c1, C(0));
            }
        }
        // dv (rows x dim) += (P ∘ D) · dO[first + c0 .. first + c1) and dk += dS · Q.
        void add_dv(bool careful, int64_t rows, int64_t c0, int64_t c1, const Matrix& dout, int64_t first,
                    C* dv) const {
            accumulate(careful, rows, {p_data.get() + c0, kQueryColumns, 1}, dout, first + c0, c1 - c0, dv);
        }
        void add_dk(bool careful, int64_t block, int64_t rows, int64_t c0, int64_t c1, const Matrix& q, int64_t first,
                    C* dk) const {
            accumulate(careful, rows, {ds_data.get() + block * kQueryColumns + c0, kQueryColumns, 1}, q, first + c0,
                       c1 - c0, dk);
        }
        // dq of queries [first + c0, first + c1) += dSᵀ · K[key .. key + keys).
        void add_dq(bool careful, int64_t keys, int64_t c0, int64_t c1, const Matrix& k, int64_t key, int64_t first,
                    C* dq) const {
            accumulate(careful, c1 - c0, {ds_data.get() + c0, 1, kQueryColumns}, k, key, keys,
                       dq + (first + c0) * k.padded_dim());
        }
    };
    static int64_t dq_size(int64_t seqlen_q, int64_t dim) {
        return round_up(seqlen_q, kQueryColumns) * round_up(dim, kLanes<C>);
    }
    static const C* dq_row(const C* dq, int64_t i, int64_t dim, C*) { return dq + i * round_up(dim, kLanes<C>); }
    static constexpr int kKeyLayouts = kRows | kPanels, kValueLayouts = kRows, kQueryLayouts = kColumns | kPanels;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
