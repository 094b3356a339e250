// What happens to a row of raw products q·k on its way to a softmax: scale, bias, visibility.
#pragma once

#include "dropout.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// One sequence of the call: where it lies, its lengths, and which keys its window and prefix leave to a query.
struct Entry {
    int64_t b;
    int64_t batch_q = 0, batch_k = 0, row_q = 0, row_k = 0;  // where queries and keys begin
    int64_t seqlen_q, seqlen_k;
    int64_t first_key = 0, prefix = 0;
    int64_t left, right, offset;
    int64_t capacity_k;  // rows of k that belong to the sequence, used or not

    Entry(const AttentionParams& p, int64_t b_)
        : b(b_),
          batch_q(b_),
          batch_k(b_),
          seqlen_q(p.seqlen_q),
          seqlen_k(p.seqlen_k),
          left(p.left),
          right(p.right),
          offset(p.offset) {
        const auto item = [](const Table<int32_t>& t, int64_t i) { return int64_t(t.data[i * t.stride[0]]); };
        if (p.cu_seqlens_q.data != nullptr) {
            batch_q = 0, row_q = item(p.cu_seqlens_q, b), seqlen_q = item(p.cu_seqlens_q, b + 1) - row_q;
        }
        if (p.cu_seqlens_k.data != nullptr) {
            batch_k = 0, row_k = item(p.cu_seqlens_k, b), seqlen_k = item(p.cu_seqlens_k, b + 1) - row_k;
        }
        capacity_k = seqlen_k;
        if (p.seqused_k.data != nullptr) seqlen_k = item(p.seqused_k, b);
        if (p.leftpad_k.data != nullptr) first_key = item(p.leftpad_k, b);
        if (p.prefix_lens.data != nullptr) prefix = std::min(item(p.prefix_lens, b), seqlen_k);
        if (p.relative_offset) offset += seqlen_k - seqlen_q;
    }

    // Query i sees keys [key_low, key_high) except [prefix, window_low), and those only.
    int64_t window_low(int64_t i) const { return i + offset - left; }
    int64_t key_low(int64_t i) const { return std::max(first_key, prefix > 0 ? 0 : window_low(i)); }
    int64_t key_high(int64_t i) const { return std::max(prefix, std::min(seqlen_k, i + offset + right + 1)); }
    // Key j is seen by queries [query_low, query_high).
    int64_t query_low(int64_t j) const {
        if (j < first_key) return seqlen_q;
        return j < prefix ? 0 : std::max<int64_t>(0, j - offset - right);
    }
    int64_t query_high(int64_t j) const { return j < prefix ? seqlen_q : std::min(seqlen_q, j - offset + left + 1); }
};

// One head of q, out or their gradients, and of k or v, from the sequence's first row on.
template <typename T>
inline Rows<T> query_rows(const Tensor4& x, const Entry& e, int64_t h) {
    return {at<T>(x, e.batch_q, h, e.row_q), x.stride[2], x.stride[3]};
}
template <typename T>
inline Rows<T> key_rows(const AttentionParams& p, const Tensor4& x, const Entry& e, int64_t h) {
    if (p.page_size == 0) return {at<T>(x, e.batch_k, h, e.row_k), x.stride[2], x.stride[3]};
    const int32_t* table = p.block_table.data + e.b * p.block_table.stride[0];
    return {at<T>(x, 0, h, 0), x.stride[2], x.stride[3], table, p.block_table.stride[1], p.page_size, x.stride[0]};
}

// Columns [first, last) of a tile that some row of it sees; whole: every row sees them all.
struct Span {
    int64_t first, last;
    bool whole;
    bool empty() const { return first >= last; }
    // Whether the two, of neighbouring rows, are one: all rows see all of the same columns.
    bool joins(const Span& next) const {
        return whole && next.whole && first == next.first && last == next.last && !empty();
    }
};

// A row of the bias and of the mask, one element after the other; null: not gathered.
template <typename C>
struct GatheredRow {
    const C* bias = nullptr;
    const uint8_t* mask = nullptr;
};

// The scores of a call, t = cap(scale · q·k) - slope · |i + offset - j| + bias, cap(x) = softcap · tanh(x / softcap).
// log2(e) is not folded into the scale: it would save nothing here, rounds large scores worse, and overflows beside a
// bias of finfo.min.
template <typename C>
struct Scores {
    const AttentionParams& p;
    const C scale;

    explicit Scores(const AttentionParams& params) : p(params), scale(static_cast<C>(params.softmax_scale)) {}

    // Whether t is scale · q·k with a positive scale, so that the largest product gives the largest score.
    bool plain() const {
        return p.bias.data == nullptr && p.softcap == 0 && p.alibi_slopes.data == nullptr && scale > 0;
    }

    // Whether query i sees all keys [first, last), and their scores are plain.
    bool plain_row(const Entry& e, int64_t i, int64_t first, int64_t last) const {
        return plain() && p.mask.data == nullptr && p.q_segments.data == nullptr && e.prefix == 0 &&
               e.key_low(i) <= first && e.key_high(i) >= last;
    }

    // Whether some key may be invisible to some query: with a fixed offset any bounded side may hide some.
    bool restricted() const {
        return p.mask.data != nullptr || p.bias.data != nullptr || p.q_segments.data != nullptr ||
               p.leftpad_k.data != nullptr || p.left < (int64_t(1) << 40) || p.right < (int64_t(1) << 40);
    }

    // The columns of a tile that rows [row, row + rows) see, by window and mask, widened to multiples of unit.
    // When rows are queries the columns are keys; otherwise (transposed) rows are keys.
    template <bool transposed>
    Span span(const Entry& e, int64_t h, int64_t row, int64_t rows, int64_t first, int64_t last, int64_t unit) const {
        const int64_t bottom = row + rows - 1, top = transposed ? std::max(row, e.first_key) : row;
        if (top > bottom) return {0, 0, false};
        int64_t low = transposed ? e.query_low(top) : e.key_low(top);
        int64_t high = transposed ? std::max(e.query_high(top), e.query_high(bottom)) : e.key_high(bottom);
        low = std::max(low, first), high = std::min(high, last);
        if (low >= high) return {0, 0, false};
        bool whole = (transposed ? e.query_low(bottom) : e.key_low(bottom)) <= low && top == row &&
                     (transposed ? e.query_high(row) : e.key_high(row)) >= high && e.prefix == 0;
        if (p.mask.data != nullptr) {
            const int64_t row_step = p.mask.stride[transposed ? 3 : 2], step = p.mask.stride[transposed ? 2 : 3];
            const uint8_t* visible = element<uint8_t, transposed>(p.mask, e.b, h, row, low);
            const int64_t n = row_step == 0 ? 1 : rows;
            if (step == 1) {  // known to the compiler, which can then take many at a time
                whole &= trim(n, low, high, [&](int64_t r, int64_t c) { return visible[r * row_step + c]; });
            } else {
                whole &= trim(n, low, high, [&](int64_t r, int64_t c) { return visible[r * row_step + c * step]; });
            }
        }
        if (p.q_segments.data != nullptr) {
            const Table<int32_t>&of_rows = transposed ? p.k_segments : p.q_segments,
                  &of_columns = transposed ? p.q_segments : p.k_segments;
            const int32_t* a = of_rows.data + e.b * of_rows.stride[0] + row * of_rows.stride[1];
            const int32_t* b = of_columns.data + e.b * of_columns.stride[0] + low * of_columns.stride[1];
            whole &= trim(rows, low, high, [&](int64_t r, int64_t c) {
                return uint8_t(a[r * of_rows.stride[1]] == b[c * of_columns.stride[1]]);
            });
        }
        if (low >= high) return {0, 0, false};
        const int64_t from = (low - first) / unit * unit, to = round_up(high - first, unit);
        return {from, to, whole && from == low - first && to == high - first};
    }

    // Narrows [low, high) to what some row sees by visible(row, column - low); returns whether all of them see all of
    // what is left.
    template <typename Visible>
    static bool trim(int64_t rows, int64_t& low, int64_t& high, const Visible& visible) {
        const int64_t n = high - low;
        uint8_t any[kMaxTileColumns] = {}, all[kMaxTileColumns];
        std::fill(all, all + n, uint8_t(1));
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < n; ++c) any[c] |= visible(r, c), all[c] &= visible(r, c);
        }
        int64_t from = 0, to = std::max<int64_t>(n, 0);
        while (from < to && !any[from]) ++from;
        while (from < to && !any[to - 1]) --to;
        high = low + to, low += from;
        return std::all_of(all + from, all + to, [](uint8_t x) { return x != 0; });
    }

    // One row of a score tile in place: t for columns [first, last) of the row, -inf where window, prefix, segment or
    // mask hide them. s points at column `first`. slope: with a softcap, receives cap's derivative; or null. gathered:
    // the row of the bias and of the mask from column `first` on, where it has been gathered.
    template <bool transposed>
    void finish_row(C* s, const Entry& e, int64_t h, int64_t row, int64_t first, int64_t last, C* slope = nullptr,
                    const GatheredRow<C>& gathered = {}) const {
        const int64_t b = e.b;
        int64_t low = transposed ? e.query_low(row) : e.key_low(row);
        int64_t high = transposed ? e.query_high(row) : e.key_high(row);
        low = std::clamp(low, first, last), high = std::clamp(high, low, last);
        std::fill(s, s + (low - first), -kInfinity<C>);
        std::fill(s + (high - first), s + (last - first), -kInfinity<C>);
        if (slope != nullptr) std::fill(slope, slope + (last - first), C(0)), slope += low - first;
        s += low - first;
        const int64_t n = high - low;
        if (p.softcap != 0) {
            cap(s, n, slope);
        } else {
            for (int64_t c = 0; c < n; ++c) s[c] *= scale;
        }
        if (p.alibi_slopes.data != nullptr) {
            const C per_key =
                static_cast<C>(p.alibi_slopes.data[b * p.alibi_slopes.stride[0] + h * p.alibi_slopes.stride[1]]);
            // The distance |i + offset - j|, whichever of i and j runs along the row.
            const int64_t start = transposed ? low + e.offset - row : low - e.offset - row;
            for (int64_t c = 0; c < n; ++c) s[c] -= per_key * std::fabs(static_cast<C>(start + c));
        }
        if (gathered.bias != nullptr) {
            add_bias(s, gathered.bias + (low - first), 1, n);
        } else if (p.bias.data != nullptr) {
            with_bias<transposed>(b, h, row, low,
                                  [&](auto* bias) { add_bias(s, bias, p.bias.stride[transposed ? 2 : 3], n); });
        }
        if (!transposed && e.prefix > 0) {
            const int64_t from = std::clamp(e.prefix, low, high), to = std::clamp(e.window_low(row), from, high);
            std::fill(s + (from - low), s + (to - low), -kInfinity<C>);
        }
        if (p.q_segments.data != nullptr) {
            const Table<int32_t>&of_row = transposed ? p.k_segments : p.q_segments,
                  &of_columns = transposed ? p.q_segments : p.k_segments;
            const int32_t mine = of_row.data[b * of_row.stride[0] + row * of_row.stride[1]];
            const int32_t* theirs = of_columns.data + b * of_columns.stride[0] + low * of_columns.stride[1];
            for (int64_t c = 0; c < n; ++c) s[c] = theirs[c * of_columns.stride[1]] == mine ? s[c] : -kInfinity<C>;
        }
        if (p.mask.data != nullptr) {
            int64_t step = p.mask.stride[transposed ? 2 : 3];
            const uint8_t* visible = element<uint8_t, transposed>(p.mask, b, h, row, low);
            if (gathered.mask != nullptr) step = 1, visible = gathered.mask + (low - first);
            if (step == 1) {
                for (int64_t c = 0; c < n; ++c) s[c] = visible[c] ? s[c] : -kInfinity<C>;
            } else if (step == 0) {
                if (n > 0 && !*visible) std::fill(s, s + n, -kInfinity<C>);
            } else {
                for (int64_t c = 0; c < n; ++c) s[c] = visible[c * step] ? s[c] : -kInfinity<C>;
            }
        }
    }

    template <typename B, bool transposed>
    static const B* element(const Tensor4& x, int64_t b, int64_t h, int64_t row, int64_t column) {
        return static_cast<const B*>(x.data) + b * x.stride[0] + h * x.stride[1] +
               (transposed ? column : row) * x.stride[2] + (transposed ? row : column) * x.stride[3];
    }

    // Gathers for a block of keys [row, row + rows) by queries [first, last) what lies query by query in memory: bias
    // and mask, key by key, `stride` apart from one key to the next; those that all queries share are left where they
    // are. Returns the first key's.
    GatheredRow<C> gather(const Entry& e, int64_t h, int64_t row, int64_t rows, int64_t first, int64_t last,
                          int64_t stride, Buffer<C>& bias, Buffer<uint8_t>& mask) const {
        GatheredRow<C> found;
        const int64_t n = last - first;
        // A bias of 32 bits is read as fast where it lies.
        const bool narrow_bias = p.bias_dtype == DType::kFloat16 || p.bias_dtype == DType::kBFloat16;
        if (p.bias.data != nullptr && p.bias.stride[2] != 0 && narrow_bias) {
            C* to = bias.reserve(rows * stride);
            with_bias<true>(e.b, h, row, first, [&](auto* from) {
                transpose(from, p.bias.stride[3], p.bias.stride[2], rows, n, to, stride);
            });
            found.bias = to;
        }
        if (p.mask.data != nullptr && p.mask.stride[2] != 0) {
            uint8_t* to = mask.reserve(rows * stride);
            transpose(element<uint8_t, true>(p.mask, e.b, h, row, first), p.mask.stride[3], p.mask.stride[2], rows, n,
                      to, stride);
            found.mask = to;
        }
        return found;
    }
    // to[r * stride + c] = from[r * row_step + c * step].
    template <typename B, typename To>
    static void transpose(const B* from, int64_t row_step, int64_t step, int64_t rows, int64_t n, To* to,
                          int64_t stride) {
        for (int64_t c = 0; c < n; ++c, from += step, ++to) {
            for (int64_t r = 0; r < rows; ++r) {
                if constexpr (std::is_same_v<B, To>) {
                    to[r * stride] = from[r * row_step];
                } else {
                    to[r * stride] = static_cast<To>(widen(from[r * row_step]));
                }
            }
        }
    }

    // use(the bias of the row from the column on).
    template <bool transposed, typename Use>
    void with_bias(int64_t b, int64_t h, int64_t row, int64_t column, const Use& use) const {
        switch (p.bias_dtype) {
            case DType::kFloat16:
                return use(element<Half, transposed>(p.bias, b, h, row, column));
            case DType::kBFloat16:
                return use(element<BFloat16, transposed>(p.bias, b, h, row, column));
            case DType::kFloat32:
                return use(element<float, transposed>(p.bias, b, h, row, column));
            case DType::kFloat64:
                return use(element<double, transposed>(p.bias, b, h, row, column));
            case DType::kE4M3:
                return;  // no bias is
        }
    }

    template <typename B>
    static void add_bias(C* s, const B* bias, int64_t step, int64_t n) {
        const auto add = [](C x, B y) {
            const C wide = static_cast<C>(widen(y));
            // The product of an unseen NaN key must not outlive a bias of -inf.
            return wide == -kInfinity<C> ? wide : x + wide;
        };
        if (step == 1) {
            for (int64_t c = 0; c < n; ++c) s[c] = add(s[c], bias[c]);
        } else {
            for (int64_t c = 0; c < n; ++c) s[c] = add(s[c], bias[c * step]);
        }
    }

    void cap(C* s, int64_t n, C* slope) const {
        const C softcap = static_cast<C>(p.softcap), inner = static_cast<C>(p.softmax_scale / p.softcap);
        for (int64_t c = 0; c < n; c += kLanes<C>) {
            C block[kLanes<C>] = {};
            const size_t bytes = static_cast<size_t>(std::min<int64_t>(kLanes<C>, n - c)) * sizeof(C);
            std::memcpy(block, s + c, bytes);
            const Vector<C> t = tanh<C>(load<C>(block) * splat(inner));
            store<C>(block, t * splat(softcap));
            std::memcpy(s + c, block, bytes);
            if (slope == nullptr) continue;
            store<C>(block, splat(C(1)) - t * t);
            std::memcpy(slope + c, block, bytes);
        }
    }
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
