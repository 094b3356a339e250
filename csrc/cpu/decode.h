// Forward for few queries and many keys: bound by reading K and V, which are read once for all query heads that share
// them, where they lie. Keys are split into parts of a fixed size, one piece of work each; parts are combined by their
// log-sum-exp in order.
#pragma once

#include "few_rows.h"
#include "schedule.h"
#include "softmax.h"
#if defined(__AMX_BF16__)
#include "amx_few_rows.h"
#elif defined(__AVX512BF16__)
#include "pairs_few_rows.h"
#endif

namespace fastattn::cpu::FASTATTN_CPU_ISA {

template <typename T, typename C>
class Decode {
    using R = FewRows<T, C>;
    using ByTiles = FewRowsByTiles<T>;

public:
    static bool suits(const AttentionParams& p) { return R::suit(p); }

    explicit Decode(const AttentionParams& params)
        : p_(params), scores_(params), group_(p_.heads_q / p_.heads_k), tiled_(ByTiles::suit(params)) {}

    void run() {
        split_ = p_.num_splits > 0 ? round_up(count_of(p_.seqlen_k, p_.num_splits), kUnit) : kSplit;
        splits_ = std::max<int64_t>(1, count_of(p_.seqlen_k, split_));
        const int64_t heads = p_.batch * p_.heads_k;
        parts_ = scratch<Buffer<C>>().reserve(heads * splits_ * part_size());
        for_each_part(p_, splits_, [&](auto... at) { part(at...); }, [&](auto... at) { combine(at...); });
    }

private:
    static constexpr int L = kLanes<C>;
    static constexpr int64_t kBlock = R::kBlock, kUnit = R::kUnit, kSplit = 512;

    // A part holds, for each row (query head of the group, query): its output, its largest score, its sum of weights.
    int64_t rows() const { return R::count(p_); }
    int64_t out_dim() const { return round_up(p_.head_dim_v, L); }
    int64_t part_size() const { return rows() * (out_dim() + 2 * L); }

    struct Tile {
        Buffer<C> q, s, k, v, sums;
        ByTiles by_tiles;
        std::vector<uint8_t> keep;
    };

    void part(int64_t b, int64_t head_k, int64_t split, int64_t index) const {
        const Entry e(p_, b);
        C* out = parts_ + index * part_size();
        Tile& tile = scratch<Tile>();
        const int64_t n = group_ * e.seqlen_q;
        C* top = out + rows() * out_dim();
        C* sum = top + rows() * L;
        std::fill(out, top, C(0));
        std::fill(top, sum, -kInfinity<C>);
        std::fill(sum, out + part_size(), C(0));
        const C* q = R::read(p_, p_.q, e, head_k, p_.head_dim_qk, tile.q);
        [[maybe_unused]] const typename ByTiles::Session session;
        if constexpr (ByTiles::kExist) {
            if (tiled_) tile.by_tiles.start(n, q, p_.head_dim_qk);
        }
        const Rows<T> k = key_rows<T>(p_, p_.k, e, head_k), v = key_rows<T>(p_, p_.v, e, head_k);
        const int64_t low = n == 0 ? 0 : e.key_low(0), high = n == 0 ? 0 : e.key_high(e.seqlen_q - 1);
        const int64_t last = std::min((split + 1) * split_, std::min(e.seqlen_k, high));
        for (int64_t j = std::max(split * split_, low / kUnit * kUnit), keys; j < last; j += keys) {
            keys = R::block(p_, k, v, j, last);
            block(e, head_k, n, q, k, v, j, keys, last, out, top, sum, tile);
        }
    }

    // Keys [j, j + keys) for all rows.
    void block(const Entry& e, int64_t head_k, int64_t n, const C* q, const Rows<T>& k, const Rows<T>& v, int64_t j,
               int64_t keys, int64_t last, C* out, C* top, C* sum, Tile& tile) const {
        C* s = tile.s.reserve(R::kMaxRows * kBlock);
        const int64_t units = round_up(keys, kUnit);
        [[maybe_unused]] const bool tiled = tiled_ && keys == units;
        R::with_rows(k, j, keys, last, p_.head_dim_qk, tile.k, [&](auto rows) {
            if constexpr (ByTiles::kExist && std::is_same_v<decltype(rows), const T**>) {
                if (tiled) return tile.by_tiles.products(rows, k.row, units, p_.head_dim_qk, s);
            }
            R::products(n, q, rows, units, round_up(p_.head_dim_qk, L), s);
        });
        for (int64_t r = 0; r < n; ++r) {
            const int64_t h = head_k * group_ + r / e.seqlen_q, i = r % e.seqlen_q;
            weigh(e, h, i, j, keys, s + r * kBlock, top[r], sum[r], out + r * out_dim(), tile);
        }
        R::with_rows(v, j, keys, last, p_.head_dim_v, tile.v, [&](auto rows) {
            if constexpr (ByTiles::kExist && std::is_same_v<decltype(rows), const T**>) {
                if (tiled) return tile.by_tiles.add_values(n, s, rows, units, out_dim(), out);
            }
            R::add_values(n, s, rows, units, out_dim(), tile.sums, out);
        });
    }

    // From products to weights, in place; the row's largest score, sum and output so far follow.
    void weigh(const Entry& e, int64_t h, int64_t i, int64_t j, int64_t keys, C* s, C& top, C& sum, C* out,
               Tile& tile) const {
        const bool plain = scores_.plain_row(e, i, j, j + keys);
        if (!plain) scores_.template finish_row<false>(s, e, h, i, j, j + keys);
        const C scale = plain ? scores_.scale : C(1), before = top;
        // Columns beyond the last key are as if unseen.
        const int64_t units = round_up(keys, kUnit);
        std::fill(s + keys, s + units, scale > 0 ? -kInfinity<C> : kInfinity<C>);
        const C highest = scale * largest(s, 0, units);
        top = highest > before ? highest : before;
        const C base = top == -kInfinity<C> ? C(0) : top;
        const Vector<C> minus = splat(-base), factor = splat(scale);
        Vector<C> total{};
        for (int64_t c = 0; c < units; c += L) {
            const Vector<C> w = weight_of<C>(load<C>(s + c) * factor + minus);
            total += w;
            store<C>(s + c, w);
        }
        const C rescale = before == top ? C(1) : exp_of<C>(before - base);
        sum = sum * rescale + sum_of<C>(total);
        if (rescale != 1) scale_row(out, rescale, out_dim());
        if (p_.dropout_threshold != 0) {
            tile.keep.assign(static_cast<size_t>(units), 0);
            Dropout(p_, e.b, h).tile(i, i + 1, j, j + keys, tile.keep.data(), kBlock);
            for (int64_t c = 0; c < units; ++c) s[c] = tile.keep[static_cast<size_t>(c)] ? s[c] : C(0);
        }
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
    const bool tiled_;
    int64_t split_ = 0, splits_ = 0;
    C* parts_ = nullptr;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
