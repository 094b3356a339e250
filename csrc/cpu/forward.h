// Forward: for each tile of queries, the keys it sees in tiles, an online softmax (Milakov and Gimelshein 2018) between
// two products. Scores never leave the cache.
#pragma once

#include "schedule.h"
#include "softmax.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// P: the products, VectorProducts, PairProducts or AmxProducts.
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
            const Rows<T> k = key_rows<T>(p_, p_.k, entry, head_k), v = key_rows<T>(p_, p_.v, entry, head_k);
            const int layouts = unread(keys.v, v, kPanels);
            run(count_of(entry.seqlen_k, kPackRows), [&](int64_t item) {
                keys.k.pack(k, item * kPackRows, kColumns);
                if (layouts == 0 && !scores_.restricted()) return;
                if (keys.v.pack(v, item * kPackRows, layouts) && scores_.restricted()) keys.careful = true;
            });
            fetch_head(b * p_.heads_k + head_k + 1, scratch<Tile>().ahead);
            const int64_t tiles = count_of(entry.seqlen_q, kQueryTile), group = p_.heads_q / p_.heads_k;
            run(tiles * group, [&](int64_t item) {
                const int64_t tile = tiles - 1 - item / group;  // causal: the longest first
                query_tile(entry, head_k * group + item % group, tile * kQueryTile, keys, scratch<Tile>());
            });
            scratch<Tile>().ahead.ask_for_the_rest();
        });
    }

private:
    static constexpr bool kVectors = std::is_same_v<typename P::Matrix, Operand<C>>;
    static constexpr int64_t kQueryTile = 96, kKeyTile = P::kKeyTile, kFetchRows = kVectors ? 256 : 128;
    static_assert(kQueryTile % P::kQueryBlock == 0 && kKeyTile <= kMaxTileColumns, "tiles hold whole blocks");

    struct Keys {
        typename P::Matrix k, v;
        std::atomic<bool> careful{false};  // v holds inf or NaN, and some query may not see it
    };
    struct Tile {
        typename P::Matrix q;
        Buffer<C> out;
        Totals<C, kQueryTile> totals;
        std::vector<Block> blocks;
        std::vector<uint8_t> keep;
        typename P::Blocks pipeline;
        Ahead ahead;
    };

    // The layouts in which x has to be packed: those in which products cannot read it where it lies.
    template <typename M>
    static int unread(M& operand, const Rows<T>& x, int layouts) {
        if constexpr (kVectors) return operand.read_in_place(x, layouts);
        return layouts;
    }

    // Lets products ask for the next head's rows: small heads end before hardware has seen a pattern.
    void fetch_head(int64_t index, Ahead& ahead) const {
        const int64_t b = index / p_.heads_k, head_k = index % p_.heads_k, group = p_.heads_q / p_.heads_k;
        if (b >= p_.batch || p_.seqlen_q > kFetchRows || p_.seqlen_k > kFetchRows || p_.page_size != 0) return;
        const Entry e(p_, b);
        const auto fetch = [&](const Rows<T>& x, int64_t rows, int64_t dim) {
            const int64_t bytes = dim * int64_t(sizeof(T));
            if (x.dim != 1) return;
            if (kVectors && x.row == dim) return ahead.add(x.data, rows * bytes);
            for (int64_t i = 0; i < rows; ++i) Ahead::ask(x.at(i), bytes);
        };
        for (int64_t g = group - 1; g >= 0; --g) {  // what is needed first is added last
            fetch(query_rows<T>(p_.out, e, head_k * group + g), e.seqlen_q, p_.head_dim_v);
            fetch(query_rows<T>(p_.q, e, head_k * group + g), e.seqlen_q, p_.head_dim_qk);
        }
        fetch(key_rows<T>(p_, p_.v, e, head_k), e.seqlen_k, p_.head_dim_v);
        fetch(key_rows<T>(p_, p_.k, e, head_k), e.seqlen_k, p_.head_dim_qk);
    }

    // Whether the window leaves more units of keys [j, end) to some of the queries [i, i + rows) than to others.
    static bool uneven(const Entry& e, int64_t i, int64_t rows, int64_t j, int64_t end) {
        const int64_t last = i + rows - 1;
        const auto unit = [&](int64_t key) { return std::clamp(key, j, end) / P::kUnit; };
        return unit(e.key_low(i)) != unit(e.key_low(last)) || unit(e.key_high(i) - 1) != unit(e.key_high(last) - 1);
    }

    void query_tile(const Entry& e, int64_t h, int64_t first, const Keys& keys, Tile& tile) {
        [[maybe_unused]] const typename P::Session session;
        const int64_t rows = std::min(kQueryTile, e.seqlen_q - first), out_dim = keys.v.padded_dim();
        Rows<T> q = query_rows<T>(p_.q, e, h);
        q.data += first * q.row;
        tile.q.reserve(rows, p_.head_dim_qk, kRows);
        if (unread(tile.q, q, kRows) != 0) {
            for (int64_t r = 0; r < rows; r += kPackRows) tile.q.pack(q, r, kRows);
        }
        C* out = tile.out.reserve(kQueryTile * out_dim);
        std::fill(out, out + rows * out_dim, C(0));
        tile.totals.start(rows, sink_of<C>(p_, h));

        const int64_t end = e.key_high(first + rows - 1);
        tile.blocks.clear();
        for (int64_t j = e.key_low(first) / kKeyTile * kKeyTile; j < end; j += kKeyTile) {
            const int64_t j_end = std::min(j + kKeyTile, e.seqlen_k);
            for (int64_t r = 0, n; r < rows; r += n) {
                n = std::min(
                    uneven(e, first + r, std::min(P::kQueryBlock, rows - r), j, j_end) ? P::kPartRows : P::kQueryBlock,
                    rows - r);
                const Span span = scores_.template span<false>(e, h, first + r, n, j, j_end, P::kUnit);
                if (!span.empty()) tile.blocks.push_back({r, n, j, span, span.whole && scores_.plain()});
            }
        }
        const Operands<P> operands{tile.q, keys.k,          keys.v,          keys.careful, scores_.scale,
                                   out,    tile.totals.top, tile.totals.sum, &tile.ahead};
        const auto finish_scores = [&](const Block& b, C* s) {
            for (int64_t i = 0; i < b.rows; ++i) {
                scores_.template finish_row<false>(s + i * kKeyTile + b.span.first, e, h, first + b.row + i,
                                                   b.key + b.span.first, b.key + b.span.last);
            }
        };
        const auto keep = [&](const Block& b) -> const uint8_t* {
            if (p_.dropout_threshold == 0) return nullptr;
            tile.keep.resize(P::kQueryBlock * kKeyTile);
            Dropout(p_, e.b, h)
                .tile(first + b.row, first + b.row + b.rows, b.key + b.span.first,
                      std::min(b.key + b.span.last, e.seqlen_k), tile.keep.data() + b.span.first, kKeyTile);
            return tile.keep.data();
        };
        tile.pipeline.run(operands, tile.blocks, finish_scores, keep);
        finish(e, h, first, rows, out, out_dim, tile);
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
