// Backward for few queries and many keys, with the formulas of backward.h: bound by reading K and V and writing dK and
// dV, which all happens once, row by row where they lie: dK and dV are sums of as few outer products as there are query
// rows. Parts of a fixed number of keys are one piece of work each; their parts of dQ are added in order.
#pragma once

#include "few_rows.h"
#include "schedule.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

template <typename T, typename C>
class DecodeBackward {
    using R = FewRows<T, C>;

public:
    // The gradient of a bias, which may be broadcast in any way, is left to Backward.
    static bool suits(const AttentionParams& p) { return R::suit(p) && p.dbias.data == nullptr; }

    explicit DecodeBackward(const AttentionParams& params)
        : p_(params), scores_(params), group_(p_.heads_q / p_.heads_k) {}

    void run() {
        splits_ = std::max<int64_t>(1, count_of(p_.seqlen_k, kSplit));
        parts_ = scratch<Buffer<C>>().reserve(p_.batch * p_.heads_k * splits_ * part_size());
        for_each_part(p_, splits_, [&](auto... at) { part(at...); }, [&](auto... at) { combine(at...); });
    }

private:
    static constexpr int L = kLanes<C>;
    static constexpr int64_t kBlock = R::kBlock, kUnit = R::kUnit, kSplit = 512;

    // A part holds its share of dQ.
    int64_t dim_qk() const { return round_up(p_.head_dim_qk, L); }
    int64_t dim_v() const { return round_up(p_.head_dim_v, L); }
    int64_t part_size() const { return R::count(p_) * dim_qk(); }

    struct Tile {
        Buffer<C> q_data, dout_data, out_data, k, v, sums;
        const C *q, *dout;
        bool q_non_finite, dout_non_finite;
        C lse[R::kMaxRows], delta[R::kMaxRows], dlse[R::kMaxRows];  // lse is +inf where nothing is seen
        alignas(64) C p[R::kMaxRows * kBlock], ds[R::kMaxRows * kBlock], slope[kBlock];
        alignas(64) uint8_t keep[kBlock];
    };

    void part(int64_t b, int64_t head_k, int64_t split, int64_t index) const {
        const Entry e(p_, b);
        C* dq = parts_ + index * part_size();
        Tile& tile = scratch<Tile>();
        const int64_t n = group_ * e.seqlen_q;
        std::fill(dq, dq + part_size(), C(0));
        if (n > 0) start(e, head_k, n, tile);
        // All rows of the sequence are written, those that no query sees or that are not used with 0.
        const int64_t first = split * kSplit, end = std::max(first, std::min(first + kSplit, e.capacity_k));
        const int64_t low = n == 0 ? end : std::clamp(e.key_low(0) / kUnit * kUnit, first, end);
        const int64_t high = n == 0 ? end : std::clamp(std::min(e.seqlen_k, e.key_high(e.seqlen_q - 1)), low, end);
        clear(e, head_k, first, low);
        const Rows<T> k = key_rows<T>(p_, p_.k, e, head_k), v = key_rows<T>(p_, p_.v, e, head_k);
        for (int64_t j = low, keys; j < high; j += keys) {
            keys = R::block(p_, k, v, j, high);
            block(e, head_k, n, k, v, j, keys, high, dq, tile);
        }
        clear(e, head_k, high, end);
    }

    void start(const Entry& e, int64_t head_k, int64_t n, Tile& tile) const {
        tile.q = R::read(p_, p_.q, e, head_k, p_.head_dim_qk, tile.q_data);
        tile.dout = R::read(p_, p_.grad_out, e, head_k, p_.head_dim_v, tile.dout_data);
        tile.q_non_finite = any_non_finite(tile.q, n * dim_qk());
        tile.dout_non_finite = any_non_finite(tile.dout, n * dim_v());
        // delta is summed as dP is: where a query sees one key, its output is a row of V, and the two, large beside
        // their difference, are rounded alike. All products of dO and O are formed, of which some lie on the diagonal.
        const C* out = R::read(p_, p_.out, e, head_k, p_.head_dim_v, tile.out_data);
        const C* rows[2 * kUnit];
        for (int64_t c = 0; c < 2 * kUnit; ++c) rows[c] = out + std::min(c, n - 1) * dim_v();
        R::products(n, tile.dout, rows, kUnit, dim_v(), tile.p);
        for (int64_t r = 0; r < n; ++r) {
            const int64_t h = head_k * group_ + r / e.seqlen_q, i = e.row_q + r % e.seqlen_q;
            const C lse = *at<C>(p_.lse, e.batch_q, h, i);
            tile.lse[r] = lse == -kInfinity<C> ? kInfinity<C> : lse;
            tile.delta[r] = tile.p[r * kBlock + r];
            tile.dlse[r] = p_.grad_lse.data == nullptr ? C(0) : *at<C>(p_.grad_lse, e.batch_q, h, i);
        }
    }
    static bool any_non_finite(const C* x, int64_t n) {
        typename Exp2<C>::Integer found = 0;
        for (int64_t i = 0; i < n; ++i) found |= is_non_finite(x[i]);
        return found != 0;
    }

    // Keys [j, j + keys) for all rows.
    void block(const Entry& e, int64_t head_k, int64_t n, const Rows<T>& k, const Rows<T>& v, int64_t j, int64_t keys,
               int64_t last, C* dq, Tile& tile) const {
        const int64_t units = round_up(keys, kUnit);
        R::with_rows(k, j, keys, last, p_.head_dim_qk, tile.k,
                     [&](auto rows) { R::products(n, tile.q, rows, units, dim_qk(), tile.p); });
        R::with_rows(v, j, keys, last, p_.head_dim_v, tile.v,
                     [&](auto rows) { R::products(n, tile.dout, rows, units, dim_v(), tile.ds); });
        for (int64_t r = 0; r < n; ++r) weigh(e, head_k, r, j, keys, tile);
        R::with_rows(k, j, keys, last, p_.head_dim_qk, tile.k,
                     [&](auto rows) { R::add_values(n, tile.ds, rows, units, dim_qk(), tile.sums, dq); });
        const bool restricted = scores_.restricted();
        write(n, tile.ds, tile.q, restricted && tile.q_non_finite, keys, p_.head_dim_qk,
              at_mutable<T>(p_.dk, e.batch_k, head_k, e.row_k + j), p_.dk);
        write(n, tile.p, tile.dout, restricted && tile.dout_non_finite, keys, p_.head_dim_v,
              at_mutable<T>(p_.dv, e.batch_k, head_k, e.row_k + j), p_.dv);
    }

    // From products to P ∘ D and scale · dS of row r, in place.
    void weigh(const Entry& e, int64_t head_k, int64_t r, int64_t j, int64_t keys, Tile& tile) const {
        const int64_t h = head_k * group_ + r / e.seqlen_q, i = r % e.seqlen_q;
        C *const s = tile.p + r * kBlock, *const dp = tile.ds + r * kBlock;
        const bool plain = scores_.plain_row(e, i, j, j + keys), dropout = p_.dropout_threshold != 0;
        const bool capped = p_.softcap != 0;
        if (!plain) scores_.template finish_row<false>(s, e, h, i, j, j + keys, capped ? tile.slope : nullptr);
        if (dropout) Dropout(p_, e.b, h).tile(i, i + 1, j, j + keys, tile.keep, kBlock);
        const Vector<C> factor = splat(plain ? scores_.scale : C(1)), nothing = splat(-kInfinity<C>), zero{};
        const Vector<C> lse = splat(tile.lse[r]), delta = splat(tile.delta[r]), dlse = splat(tile.dlse[r]);
        const Vector<C> kept = splat(static_cast<C>(p_.dropout_scale)), scale = splat(scores_.scale);
        for (int64_t c = 0; c < keys; c += L) {
            const Vector<C> t = load<C>(s + c);
            Vector<C> weight = exp<C>(t * factor - lse), g = load<C>(dp + c), dropped = weight;
            if (!plain) dropped = weight = t == nothing ? zero : weight;
            if (dropout) {
                g = kept_only<C>(g * kept, tile.keep + c);
                dropped = kept_only<C>(weight * kept, tile.keep + c);
            }
            Vector<C> ds = weight * (g - delta + dlse) * scale;
            if (capped) ds *= load<C>(tile.slope + c);
            store<C>(s + c, dropped);
            store<C>(dp + c, plain ? ds : weight == zero ? zero : ds);
        }
        std::fill(dp + keys, dp + round_up(keys, kUnit), C(0));
    }

    // to_c = sum over r of w[r][c] x_r, for `keys` rows of `like`, dk or dv. careful: passes over every weight of 0, so
    // that NaN or inf in a query that does not see the key is not felt.
    static void write(int64_t n, const C* w, const C* x, bool careful, int64_t keys, int64_t dim, T* to,
                      const Tensor4& like) {
        const int64_t row = like.stride[2], padded = round_up(dim, L);
        if (careful || like.stride[3] != 1 || dim != padded) {
            for (int64_t c = 0; c < keys; ++c) {
                C sum[kMaxHeadDim] = {};
                for (int64_t r = 0; r < n; ++r) {
                    const C weight = w[r * kBlock + c];
                    if (careful && weight == 0) continue;
                    for (int64_t d = 0; d < dim; ++d) sum[d] += weight * x[r * padded + d];
                }
                write_row<C, T>(sum, C(1), dim, to + c * row, like.stride[3]);
            }
            return;
        }
        int64_t c = 0;
        for (; c + 2 <= keys; c += 2) write_rows<2>(n, w + c, x, dim, to + c * row, row);
        if (c < keys) write_rows<1>(n, w + c, x, dim, to + c * row, row);
    }
    template <int kKeys>
    static void write_rows(int64_t n, const C* w, const C* x, int64_t dim, T* to, int64_t row) {
        constexpr int kVectors = kVectorBytes == 64 ? 8 : 4;
        int64_t d = 0;
        for (; d + kVectors * L <= dim; d += kVectors * L)
            write_columns<kKeys, kVectors>(n, w, x + d, dim, to + d, row);
        for (; d < dim; d += L) write_columns<kKeys, 1>(n, w, x + d, dim, to + d, row);
    }
    template <int kKeys, int kVectors>
    static void write_columns(int64_t n, const C* w, const C* x, int64_t dim, T* to, int64_t row) {
        Vector<C> sum[kKeys][kVectors] = {};
        for (int64_t r = 0; r < n; ++r) {
#pragma GCC unroll 2
            for (int c = 0; c < kKeys; ++c) {
                const Vector<C> weight = splat(w[r * kBlock + c]);
#pragma GCC unroll 8
                for (int u = 0; u < kVectors; ++u) sum[c][u] += weight * load<C>(x + r * dim + u * L);
            }
        }
        for (int c = 0; c < kKeys; ++c) {
            for (int u = 0; u < kVectors; ++u) store_narrow<C>(to + c * row + u * L, sum[c][u]);
        }
    }

    // Gradients of keys [first, last): 0.
    void clear(const Entry& e, int64_t head_k, int64_t first, int64_t last) const {
        const C nothing[kMaxHeadDim] = {};
        for (int64_t j = first; j < last; ++j) {
            write_row<C, T>(nothing, C(1), p_.head_dim_qk, at_mutable<T>(p_.dk, e.batch_k, head_k, e.row_k + j),
                            p_.dk.stride[3]);
            write_row<C, T>(nothing, C(1), p_.head_dim_v, at_mutable<T>(p_.dv, e.batch_k, head_k, e.row_k + j),
                            p_.dv.stride[3]);
        }
    }

    void combine(int64_t b, int64_t head_k) const {
        const Entry e(p_, b);
        const C* parts = parts_ + (b * p_.heads_k + head_k) * splits_ * part_size();
        for (int64_t r = 0; r < group_ * e.seqlen_q; ++r) {
            C dq[kMaxHeadDim] = {};
            for (int64_t k = 0; k < splits_; ++k) {
                const C* from = parts + k * part_size() + r * dim_qk();
                for (int64_t d = 0; d < p_.head_dim_qk; ++d) dq[d] += from[d];
            }
            write_row<C, T>(dq, C(1), p_.head_dim_qk,
                            at_mutable<T>(p_.dq, e.batch_q, head_k * group_ + r / e.seqlen_q, e.row_q + r % e.seqlen_q),
                            p_.dq.stride[3]);
        }
    }

    const AttentionParams& p_;
    const Scores<C> scores_;
    const int64_t group_;
    int64_t splits_ = 0;
    C* parts_ = nullptr;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
