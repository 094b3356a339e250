// Forward for few queries and many keys: bound by reading K and V, which are read once for all query heads that share
// them, where they lie. Keys are split into parts of a fixed size, one piece of work each; parts are combined by their
// log-sum-exp in order.
#pragma once

#include <type_traits>

#include "schedule.h"
#include "softmax.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// kLanes elements of type S as a vector of the compute type.
template <typename C, typename S>
inline Vector<C> load_wide(const S* from) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 2 && sizeof(C) == 4) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        if constexpr (std::is_same_v<S, Half>) return (Vector<C>)_mm512_cvtph_ps(bits);
        return (Vector<C>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    }
#endif
    Vector<C> v;
    if constexpr (std::is_same_v<S, C>) {
        v = load<C>(from);
    } else {
        for (int i = 0; i < kLanes<C>; ++i) v[i] = static_cast<C>(widen(from[i]));
    }
    return v;
}

// The sums of kLanes vectors, each in its lane.
template <typename C>
inline Vector<C> sums_of(const Vector<C>* x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {
        // Pairs are joined four times; what joins with what decides in which lane a sum ends.
        constexpr int kPlace[16] = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};
        __m512 a[16], b[8];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) a[i] = (__m512)x[kPlace[i]];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) b[i] = _mm512_unpacklo_ps(a[i], a[i + 8]) + _mm512_unpackhi_ps(a[i], a[i + 8]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) a[i] = _mm512_unpacklo_ps(b[i], b[i + 4]) + _mm512_unpackhi_ps(b[i], b[i + 4]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            b[i] = _mm512_shuffle_f32x4(a[i], a[i + 2], 0x88) + _mm512_shuffle_f32x4(a[i], a[i + 2], 0xdd);
        }
        return (Vector<C>)(_mm512_shuffle_f32x4(b[0], b[1], 0x88) + _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    }
#endif
    Vector<C> sums;
    for (int i = 0; i < kLanes<C>; ++i) sums[i] = sum_of<C>(x[i]);
    return sums;
}

template <typename T, typename C>
class Decode {
public:
    static constexpr int64_t kMaxRows = 16;

    // Whether the call is one: few query rows for a key head, many keys for a row. Otherwise packing pays.
    static bool suits(const AttentionParams& p) {
        const int64_t rows = p.heads_q / p.heads_k * p.seqlen_q;
        return rows <= kMaxRows && p.seqlen_k >= (rows <= 8 ? 8 * rows : 4 * kBlock);
    }

    explicit Decode(const AttentionParams& params) : p_(params), scores_(params), group_(p_.heads_q / p_.heads_k) {}

    void run() {
        split_ = p_.num_splits > 0 ? round_up(count_of(p_.seqlen_k, p_.num_splits), kBlock) : kSplit;
        splits_ = count_of(p_.seqlen_k, split_);
        const int64_t heads = p_.batch * p_.heads_k;
        parts_ = scratch<Buffer<C>>().reserve(heads * splits_ * part_size());
        const int64_t threads = std::max<int64_t>(1, p_.num_threads);
        parallel_for(threads, heads * splits_, [&](int64_t item) {
            part(item / splits_ / p_.heads_k, item / splits_ % p_.heads_k, item % splits_, parts_ + item * part_size());
        });
        parallel_for(threads, heads, [&](int64_t item) { combine(item / p_.heads_k, item % p_.heads_k); });
    }

private:
    static constexpr int L = kLanes<C>;
    static constexpr int64_t kBlock = 64, kSplit = 512, kAhead = 16;

    // A part holds, for each row (query head of the group, query): its output, its largest score, its sum of weights.
    int64_t rows() const { return group_ * p_.seqlen_q; }
    int64_t out_dim() const { return round_up(p_.head_dim_v, L); }
    int64_t part_size() const { return rows() * (out_dim() + 2 * L); }

    struct Tile {
        Buffer<C> q, s, k, v;
        std::vector<uint8_t> keep;
    };

    void part(int64_t b, int64_t head_k, int64_t split, C* out) const {
        const Entry e(p_, b);
        Tile& tile = scratch<Tile>();
        const int64_t n = group_ * e.seqlen_q, dim = round_up(p_.head_dim_qk, L);
        C* top = out + rows() * out_dim();
        C* sum = top + rows() * L;
        std::fill(out, top, C(0));
        std::fill(top, sum, -kInfinity<C>);
        std::fill(sum, out + part_size(), C(0));
        C* q = tile.q.reserve(round_up(n, 4) * dim);
        std::fill(q, q + round_up(n, 4) * dim, C(0));
        for (int64_t r = 0; r < n; ++r) {
            const Rows<T> from = query_rows<T>(p_.q, e, head_k * group_ + r / e.seqlen_q);
            read_row(from.at(r % e.seqlen_q), from.dim, p_.head_dim_qk, q + r * dim);
        }
        const Rows<T> k = key_rows<T>(p_, p_.k, e, head_k), v = key_rows<T>(p_, p_.v, e, head_k);
        const int64_t low = n == 0 ? 0 : e.key_low(0), high = n == 0 ? 0 : e.key_high(e.seqlen_q - 1);
        const int64_t last = std::min((split + 1) * split_, std::min(e.seqlen_k, high));
        for (int64_t j = std::max(split * split_, low / kBlock * kBlock); j < last; j += kBlock) {
            block(e, head_k, n, q, k, v, j, std::min(kBlock, last - j), last, out, top, sum, tile);
        }
    }

    // Keys [j, j + keys) for all rows.
    void block(const Entry& e, int64_t head_k, int64_t n, const C* q, const Rows<T>& k, const Rows<T>& v, int64_t j,
               int64_t keys, int64_t last, C* out, C* top, C* sum, Tile& tile) const {
        C* s = tile.s.reserve(kMaxRows * kBlock);
        if (k.dim == 1 && p_.head_dim_qk % L == 0) {
            const T* k_rows[kBlock + kAhead];
            find_rows(k, j, keys, last, k_rows);
            products(n, q, k_rows, p_.head_dim_qk, s);
        } else {
            const C* k_rows[kBlock + kAhead];
            read_rows(k, j, keys, p_.head_dim_qk, tile.k, k_rows);
            products(n, q, k_rows, round_up(p_.head_dim_qk, L), s);
        }
        for (int64_t r = 0; r < n; ++r) {
            const int64_t h = head_k * group_ + r / e.seqlen_q, i = r % e.seqlen_q;
            weigh(e, h, i, j, keys, s + r * kBlock, top[r], sum[r], out + r * out_dim(), tile);
        }
        if (v.dim == 1 && p_.head_dim_v % L == 0) {
            const T* v_rows[kBlock + kAhead];
            find_rows(v, j, keys, last, v_rows);
            add_values(n, s, v_rows, keys, out);
        } else {
            const C* v_rows[kBlock + kAhead];
            read_rows(v, j, keys, p_.head_dim_v, tile.v, v_rows);
            add_values(n, s, v_rows, keys, out);
        }
    }

    static void read_rows(const Rows<T>& x, int64_t j, int64_t keys, int64_t dim, Buffer<C>& memory, const C** rows) {
        const int64_t padded = round_up(dim, L);
        C* to = memory.reserve(kBlock * padded);
        for (int64_t c = 0; c < kBlock; ++c, to += padded) {
            read_row(x.at(j + std::min(c, keys - 1)), x.dim, dim, to);
            std::fill(to + dim, to + padded, C(0));
            rows[c] = to;
        }
        std::fill(rows + kBlock, rows + kBlock + kAhead, rows[0]);
    }
    // The rows of a block (the last one again where it is short), and those that are fetched ahead.
    static void find_rows(const Rows<T>& x, int64_t j, int64_t keys, int64_t last, const T** rows) {
        for (int64_t c = 0; c < kBlock; ++c) rows[c] = x.at(j + std::min(c, keys - 1));
        for (int64_t c = kBlock; c < kBlock + kAhead; ++c) rows[c] = x.at(std::min(j + c, last - 1));
    }
    template <typename S>
    static void fetch(const S* row, int64_t dim) {
        for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(row + d);
    }

    // s[r][c] = q_r · k_c.
    template <typename S>
    static void products(int64_t n, const C* q, const S* const* k, int64_t dim, C* s) {
        constexpr int kMost = std::min(4, L);
        int64_t r = 0;
        if constexpr (L >= 16) {
            for (; r + 8 <= n; r += 8) products_of<8>(q + r * dim, k, dim, s + r * kBlock);
        }
        for (; r + kMost <= n; r += kMost) products_of<kMost>(q + r * dim, k, dim, s + r * kBlock);
        for (; r + 2 <= n; r += 2) products_of<2>(q + r * dim, k, dim, s + r * kBlock);
        for (; r < n; ++r) products_of<1>(q + r * dim, k, dim, s + r * kBlock);
    }
    template <int kRows, typename S>
    static void products_of(const C* q, const S* const* k, int64_t dim, C* s) {
        static_assert(L % kRows == 0, "a vector holds the products of whole keys");
        constexpr int kKeys = L / kRows;
        for (int64_t c = 0; c < kBlock; c += kKeys) {
            Vector<C> sum[L];
#pragma GCC unroll 16
            for (int i = 0; i < kKeys; ++i) {  // row by row, as memory is read best
                const S* right = k[c + i];
                fetch(k[c + i + kAhead], dim);
                Vector<C> total[kRows] = {};
                for (int64_t d = 0; d < dim; d += L) {
                    const Vector<C> x = load_wide<C>(right + d);
#pragma GCC unroll 8
                    for (int a = 0; a < kRows; ++a) total[a] += load<C>(q + a * dim + d) * x;
                }
#pragma GCC unroll 8
                for (int a = 0; a < kRows; ++a) sum[a * kKeys + i] = total[a];
            }
            const Vector<C> found = sums_of<C>(sum);
            C lanes[L];
            store<C>(lanes, found);
            for (int a = 0; a < kRows; ++a) std::memcpy(s + a * kBlock + c, lanes + a * kKeys, kKeys * sizeof(C));
        }
    }

    // From products to weights, in place; the row's largest score, sum and output so far follow.
    void weigh(const Entry& e, int64_t h, int64_t i, int64_t j, int64_t keys, C* s, C& top, C& sum, C* out,
               Tile& tile) const {
        const bool plain = scores_.plain() && p_.mask.data == nullptr && p_.q_segments.data == nullptr &&
                           e.prefix == 0 && e.key_low(i) <= j && e.key_high(i) >= j + keys;
        if (!plain) scores_.template finish_row<false>(s, e, h, i, j, j + keys);
        const C scale = plain ? scores_.scale : C(1), before = top;
        // Columns beyond the last key are as if unseen.
        if (keys < kBlock) std::fill(s + keys, s + kBlock, scale > 0 ? -kInfinity<C> : kInfinity<C>);
        const C highest = scale * largest(s, 0, kBlock);
        top = highest > before ? highest : before;
        const C base = top == -kInfinity<C> ? C(0) : top;
        const Vector<C> minus = splat(-base), factor = splat(scale);
        Vector<C> total{};
        for (int64_t c = 0; c < kBlock; c += L) {
            const Vector<C> w = exp<C>(load<C>(s + c) * factor + minus);
            total += w;
            store<C>(s + c, w);
        }
        const C rescale = before == top ? C(1) : exp_of<C>(before - base);
        sum = sum * rescale + sum_of<C>(total);
        if (rescale != 1) scale_row(out, rescale, out_dim());
        if (p_.dropout_threshold != 0) {
            tile.keep.assign(kBlock, 0);
            Dropout(p_, e.b, h).tile(i, i + 1, j, j + keys, tile.keep.data(), kBlock);
            for (int64_t c = 0; c < kBlock; ++c) s[c] = tile.keep[static_cast<size_t>(c)] ? s[c] : C(0);
        }
    }

    template <typename S>
    void add_values(int64_t n, const C* s, const S* const* v, int64_t keys, C* out) const {
        int64_t r = 0;
        if constexpr (L >= 16) {
            for (; r + 8 <= n; r += 8) add_rows<8, 2>(s + r * kBlock, v, keys, out + r * out_dim());
        }
        for (; r + 4 <= n; r += 4) add_rows<4, 4>(s + r * kBlock, v, keys, out + r * out_dim());
        for (; r + 2 <= n; r += 2) add_rows<2, 8>(s + r * kBlock, v, keys, out + r * out_dim());
        for (; r < n; ++r) add_rows<1, 8>(s + r * kBlock, v, keys, out + r * out_dim());
    }
    template <int kRows, int kVectors, typename S>
    void add_rows(const C* s, const S* const* v, int64_t keys, C* out) const {
        int64_t d = 0;
        for (; d + kVectors * L <= out_dim(); d += kVectors * L) add_columns<kRows, kVectors>(s, v, keys, d, out + d);
        for (; d + 2 * L <= out_dim(); d += 2 * L) add_columns<kRows, 2>(s, v, keys, d, out + d);
        for (; d < out_dim(); d += L) add_columns<kRows, 1>(s, v, keys, d, out + d);
    }
    template <int kRows, int kVectors, typename S>
    void add_columns(const C* s, const S* const* v, int64_t keys, int64_t d, C* out) const {
        Vector<C> sum[kRows][kVectors] = {};
        for (int64_t c = 0; c < keys; ++c) {
            if (d == 0) fetch(v[c + kAhead], out_dim());
            Vector<C> right[kVectors];
#pragma GCC unroll 8
            for (int u = 0; u < kVectors; ++u) right[u] = load_wide<C>(v[c] + d + u * L);
#pragma GCC unroll 8
            for (int a = 0; a < kRows; ++a) {
                const Vector<C> left = splat(s[a * kBlock + c]);
#pragma GCC unroll 8
                for (int u = 0; u < kVectors; ++u) sum[a][u] += left * right[u];
            }
        }
        for (int a = 0; a < kRows; ++a) {
            for (int u = 0; u < kVectors; ++u) {
                const Vector<C> zero = sum[a][u] - sum[a][u];
                if (sum_of<C>(zero) != 0) sum[a][u] = seen_only(s + a * kBlock, v, keys, d + u * L);  // inf or NaN
                C* to = out + a * out_dim() + u * L;
                store<C>(to, load<C>(to) + sum[a][u]);
            }
        }
    }
    // The same sum, passing over every key of weight 0: what is unseen must not be felt.
    template <typename S>
    static Vector<C> seen_only(const C* s, const S* const* v, int64_t keys, int64_t d) {
        Vector<C> sum{};
        for (int64_t c = 0; c < keys; ++c) {
            if (s[c] != 0) sum += splat(s[c]) * load_wide<C>(v[c] + d);
        }
        return sum;
    }

    void combine(int64_t b, int64_t head_k) const {
        const Entry e(p_, b);
        const C kept = static_cast<C>(p_.dropout_threshold != 0 ? p_.dropout_scale : 1.0);
        const C* parts = parts_ + (b * p_.heads_k + head_k) * splits_ * part_size();
        C out[kMaxHeadDim + 64];
        for (int64_t r = 0; r < group_ * e.seqlen_q; ++r) {
            const int64_t h = head_k * group_ + r / e.seqlen_q, i = r % e.seqlen_q, at_top = rows() * out_dim() + r;
            const C* sink = sink_of<C>(p_, h);
            C top = sink == nullptr ? -kInfinity<C> : *sink;
            for (int64_t k = 0; k < splits_; ++k) {
                const C other = parts[k * part_size() + at_top];
                top = other > top ? other : top;
            }
            const C base = top == -kInfinity<C> ? C(0) : top;
            C sum = sink == nullptr ? C(0) : exp_of<C>(*sink - base);
            std::fill(out, out + out_dim(), C(0));
            for (int64_t k = 0; k < splits_; ++k) {
                const C* part = parts + k * part_size();
                const C factor = exp_of<C>(part[at_top] - base);
                sum += factor * part[at_top + rows() * L];
                for (int64_t d = 0; d < out_dim(); ++d) out[d] += factor * part[r * out_dim() + d];
            }
            *at_mutable<C>(p_.lse, e.batch_q, h, e.row_q + i) = lse_of(top, sum);
            write_row<C, T>(out, sum == 0 ? C(0) : kept / sum, p_.head_dim_v,
                            at_mutable<T>(p_.out, e.batch_q, h, e.row_q + i), p_.out.stride[3]);
        }
    }

    const AttentionParams& p_;
    const Scores<C> scores_;
    const int64_t group_;
    int64_t split_ = 0, splits_ = 0;
    C* parts_ = nullptr;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
