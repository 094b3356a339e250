// Products of few rows, the queries of one key head, with keys and values that are read where they lie, once for all of
// the rows. Bound by that reading.
#pragma once

#include <type_traits>

#include "scores.h"

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

// What one step of a product of rows takes from each: kLanes elements, in the compute type.
template <typename C, typename Q>
struct Step {
    static constexpr int kElements = kLanes<C>;
    template <typename S>
    static Vector<C> load_from(const S* from) {
        return load_wide<C>(from);
    }
    static Vector<C> add(Vector<C> sum, Vector<C> a, Vector<C> b) { return sum + a * b; }
};

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

// kLanes elements of the compute type, rounded to nearest, as elements of type S.
template <typename C, typename S>
inline void store_narrow(S* to, Vector<C> x) {
    if constexpr (std::is_same_v<S, C>) {
        store<C>(to, x);
        return;
    }
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 2 && sizeof(C) == 4) {
        __m256i bits;
        if constexpr (std::is_same_v<S, Half>) {
            bits = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        } else {
            const __m512i word = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
            const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
            const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
            bits = _mm512_cvtepi32_epi16(
                _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
        return;
    }
#endif
    for (int i = 0; i < kLanes<C>; ++i) narrow(x[i], to[i]);
}

template <typename T, typename C>
struct FewRows {
    static constexpr int L = kLanes<C>;
    static constexpr int64_t kMaxRows = 16, kBlock = 64;

    // Query rows that share a key head.
    static int64_t count(const AttentionParams& p) { return p.heads_q / p.heads_k * p.seqlen_q; }
    // Whether there are few of them, and so many keys for each that packing would not pay.
    static bool suit(const AttentionParams& p) {
        const int64_t rows = count(p);
        return rows <= kMaxRows && p.seqlen_k >= (rows <= 8 ? 8 * rows : 4 * kBlock);
    }

    // The rows of x, like q, that share a key head, in the compute type and padded with 0 to whole vectors:
    // query r % seqlen_q of head head_k * group + r / seqlen_q.
    static C* read(const AttentionParams& p, const Tensor4& x, const Entry& e, int64_t head_k, int64_t dim,
                   Buffer<C>& memory) {
        const int64_t group = p.heads_q / p.heads_k, padded = round_up(dim, L);
        C* to = memory.reserve(kMaxRows * padded);
        for (int64_t r = 0; r < group * e.seqlen_q; ++r) {
            const Rows<T> from = query_rows<T>(x, e, head_k * group + r / e.seqlen_q);
            read_row(from.at(r % e.seqlen_q), from.dim, dim, to + r * padded);
            std::fill(to + r * padded + dim, to + (r + 1) * padded, C(0));
        }
        return to;
    }

    // use(rows): rows[c] is row j + c of x, in whole vectors; where the block is short, the last one again. Then come
    // those of the next block, up to the last one of all, to be fetched: from four places in turn, as from four pages
    // at once memory gives more.
    template <typename Use>
    static void with_rows(const Rows<T>& x, int64_t j, int64_t keys, int64_t last, int64_t dim, Buffer<C>& memory,
                          const Use& use) {
        if (x.dim == 1 && dim % L == 0) {
            const T *rows[2 * kBlock], *next[kBlock];
            list(x, j, j + keys - 1, rows);
            list(x, std::min(j + kBlock, last - 1), last - 1, next);
            for (int64_t c = 0; c < kBlock; ++c) rows[kBlock + c] = next[c % 4 * (kBlock / 4) + c / 4];
            return use(rows);
        }
        const int64_t padded = round_up(dim, L);
        const C* rows[2 * kBlock];
        C* to = memory.reserve(kBlock * padded);
        for (int64_t c = 0; c < kBlock; ++c, to += padded) {
            read_row(x.at(j + std::min(c, keys - 1)), x.dim, dim, to);
            std::fill(to + dim, to + padded, C(0));
            rows[c] = rows[kBlock + c] = to;
        }
        use(rows);
    }
    // rows[c] = row j + c, the last one at most: page by page, as a division for each row would be felt.
    static void list(const Rows<T>& x, int64_t j, int64_t last, const T** rows) {
        for (int64_t c = 0; c < kBlock;) {
            const int64_t i = std::min(j + c, last), left = x.pages == nullptr ? kBlock : x.page_size - i % x.page_size;
            const T* at = x.at(i);
            const int64_t n = std::min(kBlock - c, i == last ? kBlock : std::min(left, last - i));
            const int64_t step = i == last ? 0 : x.row;
            for (int64_t k = 0; k < n; ++k, at += step) rows[c + k] = at;
            c += n;
        }
    }

    // Asks for a part of a row of the next block. A block is about as long ahead as memory wants, and longer than the
    // nearest cache, so the second one gets it.
    template <typename S>
    static void fetch(const S* row, int64_t dim) {
        for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(row + d, 0, 2);
    }

    // s[r][c] = q_r · k_c, in steps of the type of q.
    template <typename Q, typename S>
    static void products(int64_t n, const Q* q, const S* const* k, int64_t dim, C* s) {
        constexpr int kMost = std::min(4, L);
        int64_t r = 0;
        if constexpr (L >= 16) {
            for (; r + 8 <= n; r += 8) products_of<8>(q + r * dim, k, dim, s + r * kBlock);
        }
        for (; r + kMost <= n; r += kMost) products_of<kMost>(q + r * dim, k, dim, s + r * kBlock);
        for (; r + 2 <= n; r += 2) products_of<2>(q + r * dim, k, dim, s + r * kBlock);
        for (; r < n; ++r) products_of<1>(q + r * dim, k, dim, s + r * kBlock);
    }
    // Functions of their own, as are columns below: where all is inlined into one, registers are spilled.
    template <int kRows, typename Q, typename S>
    __attribute__((noinline)) static void products_of(const Q* q, const S* const* k, int64_t dim, C* s) {
        static_assert(L % kRows == 0, "a vector holds the products of whole keys");
        using By = Step<C, Q>;
        // As many keys at a time as share the loads of q; one row is read key by key, as memory is read best.
        constexpr int kKeys = L / kRows, kTogether = kRows == 1 ? 1 : kKeys;
        for (int64_t c = 0; c < kBlock; c += kKeys) {
            for (int i = 0; i < kKeys; ++i) fetch(k[c + i + kBlock], dim);
            Vector<C> sum[L] = {};
#pragma GCC unroll 16
            for (int first = 0; first < kKeys; first += kTogether) {
                for (int64_t d = 0; d < dim; d += By::kElements) {
                    decltype(By::load_from(q)) x[kTogether];
#pragma GCC unroll 8
                    for (int i = 0; i < kTogether; ++i) x[i] = By::load_from(k[c + first + i] + d);
#pragma GCC unroll 8
                    for (int a = 0; a < kRows; ++a) {
                        const auto left = By::load_from(q + a * dim + d);
#pragma GCC unroll 8
                        for (int i = 0; i < kTogether; ++i) {
                            Vector<C>& to = sum[a * kKeys + first + i];
                            to = By::add(to, left, x[i]);
                        }
                    }
                }
            }
            const Vector<C> found = sums_of<C>(sum);
            C lanes[L];
            store<C>(lanes, found);
            for (int a = 0; a < kRows; ++a) std::memcpy(s + a * kBlock + c, lanes + a * kKeys, kKeys * sizeof(C));
        }
    }

    // out_r += sum over c of s[r][c] v_c; dim is that of whole vectors.
    template <typename S>
    static void add_values(int64_t n, const C* s, const S* const* v, int64_t keys, int64_t dim, C* out) {
        int64_t r = 0;
        if constexpr (L >= 16) {
            for (; r + 8 <= n; r += 8) add_rows<8, 2>(s + r * kBlock, v, keys, dim, out + r * dim);
        }
        for (; r + 4 <= n; r += 4) add_rows<4, 4>(s + r * kBlock, v, keys, dim, out + r * dim);
        for (; r + 2 <= n; r += 2) add_rows<2, 8>(s + r * kBlock, v, keys, dim, out + r * dim);
        for (; r < n; ++r) add_rows<1, 8>(s + r * kBlock, v, keys, dim, out + r * dim);
    }
    template <int kRows, int kVectors, typename S>
    static void add_rows(const C* s, const S* const* v, int64_t keys, int64_t dim, C* out) {
        int64_t d = 0;
        for (; d + kVectors * L <= dim; d += kVectors * L) add_columns<kRows, kVectors>(s, v, keys, d, dim, out + d);
        for (; d + 2 * L <= dim; d += 2 * L) add_columns<kRows, 2>(s, v, keys, d, dim, out + d);
        for (; d < dim; d += L) add_columns<kRows, 1>(s, v, keys, d, dim, out + d);
    }
    template <int kRows, int kVectors, typename S>
    __attribute__((noinline)) static void add_columns(const C* s, const S* const* v, int64_t keys, int64_t d,
                                                      int64_t dim, C* out) {
        Vector<C> sum[kRows][kVectors] = {};
        for (int64_t c = 0; c < keys; ++c) {
            fetch(v[c + kBlock] + d, kVectors * L);
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
                C* to = out + a * dim + u * L;
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
};

// The same for whole blocks by the processor's products of bfloat16, where it has them: amx_few_rows.h (matrix tiles),
// pairs_few_rows.h.
template <typename T>
struct FewRowsByTiles {
    static constexpr bool kExist = false;
    struct Session {};
    static bool suit(const AttentionParams&) { return false; }
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
