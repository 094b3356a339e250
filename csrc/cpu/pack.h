// From tensors of any type and stride to the dense operands that multiply() reads, in the compute type.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "../params.h"
#include "vector.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

constexpr int64_t kMaxHeadDim = 512;

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
// Exact: the exponent is rebased by a product, which also carries subnormals; inf and NaN get all exponent bits.
inline float widen(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    const float scaled = bits_to_float(magnitude) * 0x1p112f;
    return bits_to_float(sign | float_to_bits(scaled) | ((x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u));
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(double x, float& to) { to = static_cast<float>(x); }
inline void narrow(float x, double& to) { to = x; }
// Round to nearest, ties to even.
inline void narrow(float x, BFloat16& to) {
    const uint32_t bits = float_to_bits(x);
    to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Half& to) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000;
    const float magnitude = std::fabs(x);
    uint32_t half;
    if (x != x) {
        half = 0x7e00;
    } else if (magnitude >= 65520.0f) {
        half = 0x7c00;
    } else if (magnitude < 0x1p-14f) {
        half = float_to_bits(magnitude + 0.5f) & 0xffff;  // 0.5 puts the unit of a subnormal half in the last bit
    } else {
        const uint32_t rebased = float_to_bits(magnitude) - (112u << 23);
        half = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | half);
}
inline void narrow(double x, BFloat16& to) { narrow(static_cast<float>(x), to); }
inline void narrow(double x, Half& to) { narrow(static_cast<float>(x), to); }

template <typename T>
inline const T* at(const Tensor4& x, int64_t b, int64_t h, int64_t i) {
    return static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
}
template <typename T>
inline T* at_mutable(const Tensor4& x, int64_t b, int64_t h, int64_t i) {
    return const_cast<T*>(at<T>(x, b, h, i));
}

template <typename T, typename C>
inline void read_row(const T* from, int64_t stride, int64_t n, C* to) {
    if (stride == 1) {
        for (int64_t d = 0; d < n; ++d) to[d] = widen(from[d]);
    } else {
        for (int64_t d = 0; d < n; ++d) to[d] = widen(from[d * stride]);
    }
}

template <typename C, typename T>
inline void write_row(const C* from, C factor, int64_t n, T* to, int64_t stride) {
    if (stride == 1) {
        for (int64_t d = 0; d < n; ++d) narrow(from[d] * factor, to[d]);
    } else {
        for (int64_t d = 0; d < n; ++d) narrow(from[d] * factor, to[d * stride]);
    }
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Aligned scratch memory that grows and never shrinks while it lives. Uninitialised.
template <typename C>
class Buffer {
public:
    C* reserve(int64_t n) {
        if (n > size_) {
            data_.reset(static_cast<C*>(std::aligned_alloc(64, round_up(n * static_cast<int64_t>(sizeof(C)), 64))));
            if (!data_) throw std::bad_alloc();
            size_ = n;
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

// One head's (seq x dim) matrix in the layouts that products want:
//   rows    (seq, dim)                              a left-hand operand
//   columns (seq / panel, dim, panel)               Xᵀ as right-hand operand: the product runs over dim
//   panels  (dim / panel, seq rounded up, panel)    X as right-hand operand: the product runs over seq
// Padding is 0.
template <typename C>
struct Operand {
    int64_t seq = 0, dim = 0;
    Buffer<C> rows, columns, panels;

    int64_t padded_seq() const { return round_up(seq, kPanel<C>); }
    int64_t padded_dim() const { return round_up(dim, kPanel<C>); }
    const C* row(int64_t i) const { return rows.get() + i * dim; }
    const C* column_panel(int64_t i) const { return columns.get() + i * dim; }  // i: a multiple of kPanel
    const C* panel(int64_t d, int64_t i) const { return panels.get() + d * padded_seq() + i * kPanel<C>; }

    void reserve(int64_t seq_, int64_t dim_, bool as_rows, bool as_columns, bool as_panels) {
        seq = seq_, dim = dim_;
        if (as_rows) rows.reserve(seq * dim);
        if (as_columns) columns.reserve(padded_seq() * dim);
        if (as_panels) panels.reserve(padded_seq() * padded_dim());
    }
};

constexpr int64_t kPackRows = 64;  // rows packed as one piece of work: a multiple of every panel width

// 1 when all exponent bits are set: inf or NaN. In integers, so that loops over it become vector code.
template <typename C>
inline typename Exp2<C>::Integer is_non_finite(C x) {
    using I = typename Exp2<C>::Integer;
    constexpr I kExponent = (2 * Exp2<C>::kExponentBias + 1) << Exp2<C>::kMantissa;
    I bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits & kExponent) == kExponent;
}

// Packs rows [first, first + kPackRows) of one head; returns whether they hold inf or NaN.
template <typename T, typename C>
bool pack(const Tensor4& x, int64_t b, int64_t h, int64_t first, Operand<C>& to, bool as_rows, bool as_columns,
          bool as_panels) {
    static_assert(kPackRows % kPanel<C> == 0, "a piece of work fills whole panels");
    const int64_t last = std::min(first + kPackRows, to.padded_seq());
    const int64_t dim = to.dim, padded = to.padded_dim();
    C row[kMaxHeadDim + 64];
    typename Exp2<C>::Integer exponents_full = 0;
    for (int64_t i = first; i < last; ++i) {
        if (i < to.seq) {
            read_row(at<T>(x, b, h, i), x.stride[3], dim, row);
            for (int64_t d = 0; d < dim; ++d) exponents_full |= is_non_finite(row[d]);
            if (as_rows) std::memcpy(to.rows.get() + i * dim, row, static_cast<size_t>(dim) * sizeof(C));
        } else {
            std::memset(row, 0, static_cast<size_t>(dim) * sizeof(C));
        }
        if (as_columns) {
            const int64_t lane = i % kPanel<C>;
            C* column = to.columns.get() + (i - lane) * dim + lane;
            for (int64_t d = 0; d < dim; ++d) column[d * kPanel<C>] = row[d];
        }
        if (as_panels) {
            std::memset(row + dim, 0, static_cast<size_t>(padded - dim) * sizeof(C));
            for (int64_t d = 0; d < padded; d += kPanel<C>) {
                std::memcpy(to.panels.get() + d * to.padded_seq() + i * kPanel<C>, row + d, kPanel<C> * sizeof(C));
            }
        }
    }
    return exponents_full != 0;
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
