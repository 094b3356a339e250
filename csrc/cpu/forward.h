// Forward: for each tile of queries, the keys it sees in tiles, an online softmax (Milakov and Gimelshein 2018) between
// two products. Scores never leave the cache.
#pragma once

#include "schedule.h"
#include "softmax.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// P: the products, VectorProducts or AmxProducts.
template <typename P>
class Forward {
    using T = typename P::T;
    using C = typename P::C;

public:
    explicit Forward(const AttentionParams& params) : p_(params), scores_(params) {}

    void run() {
        for_each_key_head<Keys>(p_, false, [&](int64_t b, int64_t head_k, Keys& keys, const Run& run) {
            const Entry entry(p_, b);
            keys.k.reserve(entry.seqlen_k, p_.head_dim_qk, kColumns);
            keys.v.reserve(entry.seqlen_k, p_.head_dim_v, kPanels);
            keys.careful = false;
            run(count_of(entry.seqlen_k, kPackRows), [&](int64_t item) {
                keys.k.pack(key_rows<T>(p_, p_.k, entry, head_k), item * kPackRows, kColumns);
                if (keys.v.pack(key_rows<T>(p_, p_.v, entry, head_k), item * kPackRows, kPanels) &&
                    scores_.restricted()) {
                    keys.careful = true;
                }
            });
            const int64_t tiles = count_of(entry.seqlen_q, kQueryTile), group = p_.heads_q / p_.heads_k;
            run(tiles * group, [&](int64_t item) {
                const int64_t tile = tiles - 1 - item / group;  // causal: the longest first
                query_tile(entry, head_k * group + item % group, tile * kQueryTile, keys, scratch<Tile>());
            });
        });
    }

private:
    static constexpr int64_t kQueryTile = 96, kKeyTile = P::kKeyTile;
    static_assert(kQueryTile % P::kRowBlock == 0 && kKeyTile <= kMaxTileColumns, "tiles hold whole blocks");

    struct Keys {
        typename P::Matrix k, v;
        std::atomic<bool> careful{false};  // v holds inf or NaN, and some query may not see it
    };
    struct Tile {
        typename P::Matrix q;
        Buffer<C> s, weights, out;
        Totals<C, kQueryTile> totals;
        std::vector<uint8_t> keep;
    };

    void query_tile(const Entry& e, int64_t h, int64_t first, const Keys& keys, Tile& tile) {
        [[maybe_unused]] const typename P::Session session;
        const int64_t rows = std::min(kQueryTile, e.seqlen_q - first), out_dim = keys.v.padded_dim();
        Rows<T> q = query_rows<T>(p_.q, e, h);
        q.data += first * q.row;
        tile.q.reserve(rows, p_.head_dim_qk, kRows);
        for (int64_t r = 0; r < rows; r += kPackRows) tile.q.pack(q, r, kRows);
        C* out = tile.out.reserve(kQueryTile * out_dim);
        std::fill(out, out + kQueryTile * out_dim, C(0));
        tile.totals.start(rows, sink_of<C>(p_, h));

        const int64_t end = e.key_high(first + rows - 1);
        for (int64_t j = e.key_low(first) / kKeyTile * kKeyTile; j < end; j += kKeyTile) {
            const int64_t j_end = std::min(j + kKeyTile, e.seqlen_k);
            for (int64_t r = 0; r < rows; r += P::kRowBlock) {
                block(e, h, first, r, std::min(P::kRowBlock, rows - r), j, j_end, keys, out + r * out_dim, tile);
            }
        }
        finish(e, h, first, rows, out, out_dim, tile);
    }

    // Rows [r, r + rows) of the tile against keys [j, j_end).
    void block(const Entry& e, int64_t h, int64_t first, int64_t r, int64_t rows, int64_t j, int64_t j_end,
               const Keys& keys, C* out, Tile& tile) {
        const Span span = scores_.template span<false>(e, h, first + r, rows, j, j_end, P::kUnit);
        if (span.empty()) return;
        C* s = tile.s.reserve(P::kRowBlock * kKeyTile);
        P::scores(tile.q, r, rows, keys.k, j, span.first, span.last, s, kKeyTile);
        const bool dropout = p_.dropout_threshold != 0;
        if (dropout) {
            tile.keep.resize(P::kRowBlock * kKeyTile);
            dropout_tile(p_, e.b, h, first + r, first + r + rows, j + span.first, std::min(j + span.last, j_end),
                         tile.keep.data() + span.first, kKeyTile);
        }
        const bool plain = span.whole && scores_.plain();
        if (!plain) {
            for (int64_t i = 0; i < rows; ++i) {
                scores_.template finish_row<false>(s + i * kKeyTile + span.first, e, h, first + r + i, j + span.first,
                                                   j + span.last);
            }
        }
        typename P::Weights weights(s, tile.weights);
        softmax_block<P>(s, rows, span, plain ? scores_.scale : C(1), dropout ? tile.keep.data() : nullptr, weights,
                         tile.totals.top + r, tile.totals.sum + r, out, keys.v.padded_dim());
        P::accumulate_weights(keys.careful, weights, rows, span.first, span.last, keys.v, j, out);
    }

    void finish(const Entry& e, int64_t h, int64_t first, int64_t rows, const C* out, int64_t out_dim,
                const Tile& tile) {
        const C kept = static_cast<C>(p_.dropout_threshold != 0 ? p_.dropout_scale : 1.0);
        for (int64_t r = 0; r < rows; ++r) {
            const C sum = sum_of<C>(tile.totals.sum[r]), factor = sum == 0 ? C(0) : kept / sum;
            *at_mutable<C>(p_.lse, e.batch_q, h, e.row_q + first + r) = lse_of(tile.totals.top[r], sum);
            write_row<C, T>(out + r * out_dim, factor, p_.head_dim_v,
                            at_mutable<T>(p_.out, e.batch_q, h, e.row_q + first + r), p_.out.stride[3]);
        }
    }

    const AttentionParams& p_;
    const Scores<C> scores_;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
