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
    } else if constexpr (std::is_same_v<S, BFloat16> && kVectorBytes == 16) {  // longer, compilers find it in the loop
        typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
        Narrow bits;
        std::memcpy(&bits, from, sizeof bits);
        v = (Vector<C>)(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
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
    // Keys of a block at most, as far apart as the scores of two rows; a block holds whole units.
    static constexpr int64_t kMaxRows = 16, kBlock = 512, kUnit = 64;

    // Query rows that share a key head.
    static int64_t count(const AttentionParams& p) { return p.heads_q / p.heads_k * p.seqlen_q; }
    // Whether there are few of them, and so many keys for each that packing would not pay.
    static bool suit(const AttentionParams& p) {
        const int64_t rows = count(p);
        return rows <= kMaxRows && p.seqlen_k >= (rows <= 8 ? 8 * rows : 4 * kUnit);
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

    static bool lie_in_vectors(const Rows<T>& x, int64_t dim) { return x.dim == 1 && dim % L == 0; }
    // How many of the keys [j, last) are a block: whole units, then the rest. Copied rows should stay in the cache.
    static int64_t block(const AttentionParams& p, const Rows<T>& k, const Rows<T>& v, int64_t j, int64_t last) {
        const bool in_place = lie_in_vectors(k, p.head_dim_qk) && lie_in_vectors(v, p.head_dim_v);
        const int64_t left = std::min(last - j, in_place ? kBlock : kUnit);
        return left < kUnit ? left : left / kUnit * kUnit;
    }

    // use(rows): rows[c] is row j + c of x, in whole vectors; where the last unit is short, the last one again. Then
    // comes a unit of those that follow, up to the last one of all, to be fetched.
    template <typename Use>
    static void with_rows(const Rows<T>& x, int64_t j, int64_t keys, int64_t last, int64_t dim, Buffer<C>& memory,
                          const Use& use) {
        const int64_t count = round_up(keys, kUnit);
        if (lie_in_vectors(x, dim)) {
            const T* rows[kBlock + kUnit];
            list(x, j, j + keys - 1, count, rows);
            list(x, std::min(j + keys, last - 1), last - 1, kUnit, rows + count);
            return use(rows);
        }
        const int64_t padded = round_up(dim, L);
        const C* rows[kBlock + kUnit];
        C* to = memory.reserve(count * padded);
        for (int64_t c = 0; c < count; ++c, to += padded) {
            read_row(x.at(j + std::min(c, keys - 1)), x.dim, dim, to);
            std::fill(to + dim, to + padded, C(0));
            rows[c] = to;
        }
        std::fill(rows + count, rows + count + kUnit, rows[count - 1]);
        use(rows);
    }
    // rows[c] = row j + c, the last one at most: page by page, as a division for each row would be felt.
    static void list(const Rows<T>& x, int64_t j, int64_t last, int64_t count, const T** rows) {
        for (int64_t c = 0; c < count;) {
            const int64_t i = std::min(j + c, last), left = x.pages == nullptr ? count : x.page_size - i % x.page_size;
            const T* at = x.at(i);
            const int64_t n = std::min(count - c, i == last ? count : std::min(left, last - i));
            const int64_t step = i == last ? 0 : x.row;
            for (int64_t k = 0; k < n; ++k, at += step) rows[c + k] = at;
            c += n;
        }
    }

    // A block's rows are read from four places in turn, its quarters: from four pages at once memory gives more. Where
    // several groups of query rows or of columns go through them, so many of each at a time as the nearest cache keeps.
    static constexpr int64_t kPlaces = 4;
    static int64_t chunk(int64_t place, bool one_group, int64_t dim) {
        const int64_t bytes = dim * int64_t(sizeof(T));
        return one_group ? place : bytes <= 256 ? 16 : bytes <= 512 ? 8 : 4;
    }

    // Asks for a part of a row that will be read kAhead rows later, or in the next chunk: some 16 KiB are on their way,
    // half of the nearest cache, so the second one gets them.
    static constexpr int64_t kAhead = 8;
    template <typename S>
    static void fetch(const S* row, int64_t dim) {
        for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(row + d, 0, 2);
    }

    // use(rows, r, i, end) for query rows [r, r + rows) of n and keys [i, end) of each place: groups of rows as large
    // as kGroups, which fall, have them; all of them before the next `step` keys.
    template <int... kGroups, typename Use>
    static void for_groups(int64_t n, int64_t place, int64_t step, const Use& use) {
        for (int64_t i = 0; i < place; i += step) {
            int64_t r = 0;
            const auto all_of = [&](auto rows) {
                for (; r + rows <= n; r += rows) use(rows, r, i, i + step);
            };
            (all_of(std::integral_constant<int, kGroups>{}), ...);
        }
    }

    // s[r][c] = q_r · k_c for whole units of keys, in steps of the type of q.
    template <typename Q, typename S>
    static void products(int64_t n, const Q* q, const S* const* k, int64_t keys, int64_t dim, C* s) {
        constexpr int kMost = std::min(4, L);
        const int64_t place = keys / kPlaces, step = chunk(place, n <= 2 || n == kMost, dim);
        for_groups<kMost, 2, 1>(n, place, step, [&](auto rows, int64_t r, int64_t i, int64_t end) {
            products_of<rows>(q + r * dim, k, place, i, end, dim, s + r * kBlock);
        });
    }
    // Keys [i, end) of each of the places. Functions of their own, as are columns below: where all is inlined into one,
    // registers are spilled.
    template <int kRows, typename Q, typename S>
    __attribute__((noinline)) static void products_of(const Q* q, const S* const* k, int64_t place, int64_t i,
                                                      int64_t end, int64_t dim, C* s) {
        static_assert(L % kRows == 0, "a vector holds the products of whole keys");
        using By = Step<C, Q>;
        // kKeys keys at a time, kEach neighbours from kFrom places; as many together as share the loads of q.
        constexpr int kKeys = L / kRows, kFrom = std::min<int>(kKeys, kPlaces), kEach = kKeys / kFrom;
        constexpr int kTogether = std::min<int>(kKeys, 4);
        constexpr bool kByStep = By::kElements * sizeof(S) >= 32;
        for (; i < end; i += kEach) {
            for (int64_t first = i; first < kPlaces * place; first += kFrom * place) {
                Vector<C> sum[L] = {};
                const auto key = [&](int x) { return first + x % kFrom * place + x / kFrom; };
#pragma GCC unroll 16
                for (int x0 = 0; x0 < kKeys; x0 += kTogether) {
                    const S *row[kTogether], *next[kTogether];
#pragma GCC unroll 16
                    for (int x = 0; x < kTogether; ++x) {
                        row[x] = k[key(x0 + x)], next[x] = k[key(x0 + x) + kAhead];
                        if (!kByStep) fetch(next[x], dim);
                    }
                    for (int64_t d = 0; d < dim; d += By::kElements) {
                        decltype(By::load_from(q)) right[kTogether];
#pragma GCC unroll 16
                        for (int x = 0; x < kTogether; ++x) right[x] = By::load_from(row[x] + d);
                        if (kByStep) {
#pragma GCC unroll 16
                            for (int x = 0; x < kTogether; ++x) fetch(next[x] + d, By::kElements);
                        }
#pragma GCC unroll 8
                        for (int a = 0; a < kRows; ++a) {
                            const auto left = By::load_from(q + a * dim + d);
#pragma GCC unroll 16
                            for (int x = 0; x < kTogether; ++x) {
                                const int from = (x0 + x) % kFrom, each = (x0 + x) / kFrom;
                                Vector<C>& to = sum[a * kKeys + from * kEach + each];
                                to = By::add(to, left, right[x]);
                            }
                        }
                    }
                }
                C lanes[L];
                store<C>(lanes, sums_of<C>(sum));
                asm("" : "+m"(lanes));  // or it is shuffled, lane by lane, where copies are cheaper
                for (int a = 0; a < kRows; ++a) {
                    for (int f = 0; f < kFrom; ++f) {
                        std::memcpy(s + a * kBlock + first + f * place, lanes + a * kKeys + f * kEach,
                                    kEach * sizeof(C));
                    }
                }
            }
        }
    }

    // out_r += sum over c of s[r][c] v_c for whole units of keys; dim is that of whole vectors.
    template <typename S>
    static void add_values(int64_t n, const C* s, const S* const* v, int64_t keys, int64_t dim, Buffer<C>& memory,
                           C* out) {
        const int64_t place = keys / kPlaces, step = chunk(place, n <= 2 && dim == 8 * L, dim);
        C* sums = memory.reserve(kMaxRows * dim);
        const auto add = [&](auto rows, int64_t r, int64_t i, int64_t end) {
            constexpr int kVectors = rows < 4 ? 8 : L < 16 ? 2 : 4;
            add_rows<rows, kVectors>(s + r * kBlock, v, place, i, end, dim, sums + r * dim);
        };
        // Two rows take whole rows of values, as memory is read best; where there are many, or where vectors are short,
        // computing is the limit.
        n > 4 || L < 16 ? for_groups<4, 2, 1>(n, place, step, add) : for_groups<2, 1>(n, place, step, add);
        finish(n, s, v, place, step, dim, sums, out);
    }
    template <int kRows, int kVectors, typename S>
    static void add_rows(const C* s, const S* const* v, int64_t place, int64_t i, int64_t end, int64_t dim, C* sums) {
        int64_t d = 0;
        for (; d + kVectors * L <= dim; d += kVectors * L)
            add_columns<kRows, kVectors>(s, v, place, i, end, d, dim, sums + d);
        for (; d + 2 * L <= dim; d += 2 * L) add_columns<kRows, 2>(s, v, place, i, end, d, dim, sums + d);
        for (; d < dim; d += L) add_columns<kRows, 1>(s, v, place, i, end, d, dim, sums + d);
    }
    template <int kRows, int kVectors, typename S>
    __attribute__((noinline)) static void add_columns(const C* s, const S* const* v, int64_t place, int64_t i,
                                                      int64_t end, int64_t d, int64_t dim, C* sums) {
        Vector<C> sum[kRows][kVectors] = {};
        const bool more = i > 0;
        const int64_t ahead = std::min(end - i, kAhead);
        for (; i < end; ++i) {
            for (int64_t c = i; c < kPlaces * place; c += place) {
                fetch(v[c + ahead] + d, kVectors * L);
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
        }
#pragma GCC unroll 8
        for (int a = 0; a < kRows; ++a) {
#pragma GCC unroll 8
            for (int u = 0; u < kVectors; ++u) {
                C* to = sums + a * dim + u * L;
                store<C>(to, more ? load<C>(to) + sum[a][u] : sum[a][u]);
            }
        }
    }
    // out += sums; where they hold inf or NaN, summed anew without the keys of weight 0: what is unseen must not be
    // felt.
    template <typename S>
    static void finish(int64_t n, const C* s, const S* const* v, int64_t place, int64_t step, int64_t dim,
                       const C* sums, C* out) {
        for (int64_t r = 0; r < n; ++r) {
            const C* row = sums + r * dim;
            C* to = out + r * dim;
            Vector<C> zero{};
            for (int64_t d = 0; d < dim; d += L) zero += load<C>(row + d) - load<C>(row + d);
            const bool finite = sum_of<C>(zero) == 0;
            for (int64_t d = 0; d < dim; d += L) {
                const Vector<C> sum = finite ? load<C>(row + d) : seen_only(s + r * kBlock, v, place, step, d);
                store<C>(to + d, load<C>(to + d) + sum);
            }
        }
    }
    // In the order of add_columns, so that beside it an unseen NaN changes no bit; beside products of bfloat16, whose
    // weights are rounded as these are not, it may.
    template <typename S>
    static Vector<C> seen_only(const C* s, const S* const* v, int64_t place, int64_t step, int64_t d) {
        Vector<C> sum{};
        for (int64_t first = 0; first < place; first += step) {
            Vector<C> part{};
            for (int64_t i = first; i < first + step; ++i) {
                for (int64_t c = i; c < kPlaces * place; c += place) {
                    if (s[c] != 0) part += splat(s[c]) * load_wide<C>(v[c] + d);
                }
            }
            sum = first == 0 ? part : sum + part;
        }
        return sum;
    }
};

// The same for whole units by the processor's products of bfloat16, where it has them: amx_few_rows.h (matrix tiles),
// pairs_few_rows.h.
template <typename T>
struct FewRowsByTiles {
    static constexpr bool kExist = false;
    struct Session {};
    static bool suit(const AttentionParams&) { return false; }
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
