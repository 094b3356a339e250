// Forward: for each tile of queries, the keys it sees in tiles, an online softmax (Milakov and Gimelshein 2018) between
// two products. Scores never leave the cache.
#pragma once

#include "schedule.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

template <typename T, typename C>
class Forward {
public:
    explicit Forward(const AttentionParams& params) : p_(params), scores_(params) {}

    void run() {
        for_each_key_head<Keys>(p_, false, [&](int64_t b, int64_t head_k, Keys& keys, const Run& run) {
            keys.k.reserve(p_.seqlen_k, p_.head_dim_qk, false, true, false);
            keys.v.reserve(p_.seqlen_k, p_.head_dim_v, false, false, true);
            std::atomic<bool> non_finite{false};
            run((p_.seqlen_k + kPackRows - 1) / kPackRows, [&](int64_t item) {
                pack<T>(p_.k, b, head_k, item * kPackRows, keys.k, false, true, false);
                if (pack<T>(p_.v, b, head_k, item * kPackRows, keys.v, false, false, true)) non_finite = true;
            });
            keys.careful = non_finite && scores_.restricted();
            const int64_t tiles = (p_.seqlen_q + kQueryTile - 1) / kQueryTile, group = p_.heads_q / p_.heads_k;
            run(tiles * group, [&](int64_t item) {
                const int64_t tile = tiles - 1 - item / group;  // causal: the longest first
                query_tile(b, head_k * group + item % group, tile * kQueryTile, keys, scratch<Tile>());
            });
        });
    }

private:
    struct Keys {
        Operand<C> k, v;
        bool careful = false;  // v holds inf or NaN, and some query may not see it
    };
    struct Tile {
        Buffer<C> q, s, out;
        C top[kQueryTile], sum[kQueryTile];
        std::vector<uint8_t> keep;
    };

    void query_tile(int64_t b, int64_t h, int64_t first, const Keys& keys, Tile& tile) {
        const int64_t dim = p_.head_dim_qk, rows = std::min(kQueryTile, p_.seqlen_q - first);
        const int64_t out_dim = keys.v.padded_dim();
        C* q = tile.q.reserve(kQueryTile * dim);
        C* s = tile.s.reserve(kQueryTile * kKeyTile);
        C* out = tile.out.reserve(kQueryTile * out_dim);
        for (int64_t r = 0; r < rows; ++r) {
            read_row(at<T>(p_.q, b, h, first + r), p_.q.stride[3], dim, q + r * dim);
            tile.top[r] = -kInfinity<C>, tile.sum[r] = 0;
        }
        std::fill(out, out + rows * out_dim, C(0));

        const int64_t end = scores_.key_high(first + rows - 1);
        for (int64_t j = scores_.key_low(first) / kKeyTile * kKeyTile; j < end; j += kKeyTile) {
            const int64_t j_end = std::min(j + kKeyTile, keys.k.padded_seq());
            const auto span = [&](int64_t r) {
                const int64_t last = std::min(r + kTileRows, rows) - 1;
                return Span<C>(scores_.key_low(first + r), scores_.key_high(first + last), j, j_end);
            };
            for (int64_t panel = 0; panel < j_end - j; panel += kPanel<C>) {
                for (int64_t r = 0; r < rows; r += kTileRows) {
                    if (!span(r).holds(panel)) continue;
                    multiply<C>(std::min<int64_t>(kTileRows, rows - r), q + r * dim, dim,
                                keys.k.column_panel(j + panel), dim, s + r * kKeyTile + panel, kKeyTile, false);
                }
            }
            if (p_.dropout_threshold != 0) {
                tile.keep.resize(kQueryTile * kKeyTile);
                dropout_tile(p_, b, h, first, first + rows, j, std::min(j_end, p_.seqlen_k), tile.keep.data(),
                             kKeyTile);
            }
            for (int64_t r = 0; r < rows; ++r) {
                const Span<C> columns = span(r / kTileRows * kTileRows);
                if (!columns.empty())
                    softmax_row(b, h, first, r, j, columns, s + r * kKeyTile, out + r * out_dim, tile);
            }
            for (int64_t d = 0; d < out_dim; d += kPanel<C>) {
                for (int64_t r = 0; r < rows; r += kTileRows) {
                    const Span<C> columns = span(r);
                    if (columns.empty()) continue;
                    const int64_t block = std::min<int64_t>(kTileRows, rows - r), depth = columns.last - columns.first;
                    const C* weights = s + r * kKeyTile + columns.first;
                    const C* v = keys.v.panel(d, j + columns.first);
                    if (keys.careful) {
                        multiply_nonzero<C>(block, weights, kKeyTile, v, depth, out + r * out_dim + d, out_dim);
                    } else {
                        multiply<C>(block, weights, kKeyTile, v, depth, out + r * out_dim + d, out_dim, true);
                    }
                }
            }
        }
        finish(b, h, first, rows, out, out_dim, tile);
    }

    // Turns the scores of one row into weights relative to the row's maximum so far, and rescales what it has summed.
    void softmax_row(int64_t b, int64_t h, int64_t first, int64_t r, int64_t j, Span<C> columns, C* s, C* out,
                     Tile& tile) {
        const int64_t i = first + r, n = columns.last - columns.first;
        s += columns.first;
        scores_.template finish_row<false>(s, b, h, i, j + columns.first, j + columns.last, scores_.key_low(i),
                                           scores_.key_high(i));
        Vector<C> highest = splat(-kInfinity<C>);
        for (int64_t c = 0; c < n; c += kLanes<C>) {
            const Vector<C> t = load<C>(s + c);
            highest = t > highest ? t : highest;
        }
        const C before = tile.top[r], top = std::max(before, max_of<C>(highest));
        // Nothing seen yet: 0 in place of -inf, so that -inf - top is -inf, and a NaN stays one.
        const C base = top == -kInfinity<C> ? C(0) : top;
        const Vector<C> minus = splat(base);
        Vector<C> sum{};
        for (int64_t c = 0; c < n; c += kLanes<C>) {
            const Vector<C> weight = exp<C>(load<C>(s + c) - minus);
            sum += weight;
            store<C>(s + c, weight);
        }
        const C rescale = before == top ? C(1) : exp_of<C>(before - base);
        tile.top[r] = top;
        tile.sum[r] = tile.sum[r] * rescale + sum_of<C>(sum);
        if (rescale != 1) {
            for (int64_t d = 0; d < (p_.head_dim_v); ++d) out[d] *= rescale;
        }
        if (p_.dropout_threshold != 0) {
            const uint8_t* keep = tile.keep.data() + r * kKeyTile + columns.first;
            for (int64_t c = 0; c < n; ++c) s[c] = keep[c] ? s[c] : C(0);
        }
    }

    void finish(int64_t b, int64_t h, int64_t first, int64_t rows, const C* out, int64_t out_dim, const Tile& tile) {
        const C kept = static_cast<C>(p_.dropout_threshold != 0 ? p_.dropout_scale : 1.0);
        for (int64_t r = 0; r < rows; ++r) {
            const C sum = tile.sum[r], factor = sum == 0 ? C(0) : kept / sum;
            const double top = static_cast<double>(tile.top[r] == -kInfinity<C> ? C(0) : tile.top[r]);
            const double lse = top + std::log(static_cast<double>(sum));
            *at_mutable<C>(p_.lse, b, h, first + r) = static_cast<C>(lse);
            write_row<C, T>(out + r * out_dim, factor, p_.head_dim_v, at_mutable<T>(p_.out, b, h, first + r),
                            p_.out.stride[3]);
        }
    }

    const AttentionParams& p_;
    const Scores<C> scores_;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
