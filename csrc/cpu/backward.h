// Backward, by recomputation: with P = exp(S - lse) and delta = rowsum(dO ∘ O) - dlse,
//   dV = (P ∘ D)ᵀ dO,   dS = P ∘ (D ∘ dO Vᵀ - delta),   dQ = scale · dS K,   dK = scale · dSᵀ Q,   dbias = dS,
// D being dropout's factors. dq walks over tiles of queries, dkdv over tiles of keys: every sum has one owner and one
// order, so that nothing depends on the number of threads.
#pragma once

#include "schedule.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

template <typename T, typename C>
class Backward {
public:
    explicit Backward(const AttentionParams& params) : p_(params), scores_(params) {}

    void run() {
        start_dbias();
        for_each_key_head<Head>(p_, bias_shared_by_heads(), [&](int64_t b, int64_t head_k, Head& head, const Run& run) {
            start_head(b, head_k, head, run);
            const int64_t group = p_.heads_q / p_.heads_k;
            const int64_t query_tiles = count(p_.seqlen_q, kQueryTile), key_tiles = count(p_.seqlen_k, kKeyRows);
            for (int64_t g = 0; g < group; ++g) {
                const int64_t h = head_k * group + g;
                start_query_head(b, h, head, run);
                run(key_tiles + query_tiles, [&](int64_t item) {
                    Tile& tile = scratch<Tile>();
                    if (item < key_tiles) {  // causal: the longest first, both ways
                        dkdv_tile(b, h, item * kKeyRows, head, g == 0, g == group - 1, tile);
                    } else {
                        dq_tile(b, h, (key_tiles + query_tiles - 1 - item) * kQueryTile, head, tile);
                    }
                });
            }
        });
        finish_dbias();
    }

private:
    static constexpr int64_t kKeyRows = 96;   // rows of a transposed tile, a multiple of kTileRows
    static constexpr int64_t kColumns = 256;  // columns of either kind of tile
    static int64_t count(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

    struct Head {
        Operand<C> k, v, q, dout;
        Buffer<C> dk, dv;           // (seqlen_k, padded dim), summed over the query heads of the group
        std::vector<C> lse, delta;  // per query, padded; lse is +inf where nothing is seen
        std::atomic<bool> k_non_finite{false}, q_non_finite{false}, dout_non_finite{false};
    };
    struct Tile {
        Buffer<C> s, dp, sum, sum2;
        std::vector<uint8_t> keep;
    };

    void start_head(int64_t b, int64_t head_k, Head& head, const Run& run) {
        head.k.reserve(p_.seqlen_k, p_.head_dim_qk, true, true, true);
        head.v.reserve(p_.seqlen_k, p_.head_dim_v, true, true, false);
        head.k_non_finite = false;
        run(count(p_.seqlen_k, kPackRows), [&](int64_t item) {
            if (pack<T>(p_.k, b, head_k, item * kPackRows, head.k, true, true, true)) head.k_non_finite = true;
            pack<T>(p_.v, b, head_k, item * kPackRows, head.v, true, true, false);
        });
        head.dk.reserve(p_.seqlen_k * head.k.padded_dim());
        head.dv.reserve(p_.seqlen_k * head.v.padded_dim());
    }

    void start_query_head(int64_t b, int64_t h, Head& head, const Run& run) {
        head.q.reserve(p_.seqlen_q, p_.head_dim_qk, true, true, true);
        head.dout.reserve(p_.seqlen_q, p_.head_dim_v, true, true, true);
        head.q_non_finite = head.dout_non_finite = false;
        const size_t padded = static_cast<size_t>(head.q.padded_seq());
        head.lse.assign(padded, kInfinity<C>);
        head.delta.assign(padded, C(0));
        run(count(p_.seqlen_q, kPackRows), [&](int64_t item) {
            const int64_t first = item * kPackRows, last = std::min(first + kPackRows, p_.seqlen_q);
            if (pack<T>(p_.q, b, h, first, head.q, true, true, true)) head.q_non_finite = true;
            if (pack<T>(p_.grad_out, b, h, first, head.dout, true, true, true)) head.dout_non_finite = true;
            C out[kMaxHeadDim];
            for (int64_t i = first; i < last; ++i) {
                read_row(at<T>(p_.out, b, h, i), p_.out.stride[3], p_.head_dim_v, out);
                double delta = 0;
                for (int64_t d = 0; d < p_.head_dim_v; ++d) {
                    delta += static_cast<double>(out[d]) * static_cast<double>(head.dout.row(i)[d]);
                }
                if (p_.grad_lse.data != nullptr) delta -= static_cast<double>(*at<C>(p_.grad_lse, b, h, i));
                head.delta[static_cast<size_t>(i)] = static_cast<C>(delta);
                const double lse = static_cast<double>(*at<C>(p_.lse, b, h, i));
                head.lse[static_cast<size_t>(i)] = lse == -kInfinity<double> ? kInfinity<C> : static_cast<C>(lse);
            }
        });
    }

    // From products to dS in `s` and, transposed, P ∘ D in `dp`. Rows are queries, or keys when transposed; lse and
    // delta belong to the row, or to the columns. keep is null without dropout.
    template <bool transposed>
    void gradient_row(C* s, C* dp, int64_t n, const C* lse, const C* delta, const uint8_t* keep, int64_t keep_step) {
        const Vector<C> nothing = splat(-kInfinity<C>);
        if (keep != nullptr) {
            const C kept = static_cast<C>(p_.dropout_scale);
            for (int64_t c = 0; c < n; ++c) dp[c] = keep[c * keep_step] ? dp[c] * kept : C(0);
        }
        for (int64_t c = 0; c < n; c += kLanes<C>) {
            const Vector<C> t = load<C>(s + c);
            const Vector<C> row_lse = transposed ? load<C>(lse + c) : splat(*lse);
            const Vector<C> row_delta = transposed ? load<C>(delta + c) : splat(*delta);
            const Vector<C> p = t == nothing ? Vector<C>{} : exp<C>(t - row_lse);
            const Vector<C> ds = p == Vector<C>{} ? Vector<C>{} : p * (load<C>(dp + c) - row_delta);
            store<C>(s + c, ds);
            if (transposed) store<C>(dp + c, p);
        }
        if (transposed && keep != nullptr) {
            const C kept = static_cast<C>(p_.dropout_scale);
            for (int64_t c = 0; c < n; ++c) dp[c] = keep[c * keep_step] ? dp[c] * kept : C(0);
        }
    }

    static void accumulate(bool careful, int64_t rows, const C* a, const Operand<C>& right, int64_t first,
                           int64_t depth, C* sum) {
        const int64_t dim = right.padded_dim();
        for (int64_t d = 0; d < dim; d += kPanel<C>) {
            if (careful) {
                multiply_nonzero<C>(rows, a, kColumns, right.panel(d, first), depth, sum + d, dim);
            } else {
                multiply<C>(rows, a, kColumns, right.panel(d, first), depth, sum + d, dim, true);
            }
        }
    }

    // The two products S and dP (or their transposes) of a tile, where some row of a block sees some column of a panel.
    template <typename SpanOf>
    void products(int64_t rows, const C* left_s, int64_t dim_s, const Operand<C>& right_s, const C* left_dp,
                  int64_t dim_dp, const Operand<C>& right_dp, int64_t column, int64_t width, const SpanOf& span, C* s,
                  C* dp) {
        for (int64_t panel = 0; panel < width; panel += kPanel<C>) {
            for (int64_t r = 0; r < rows; r += kTileRows) {
                if (!span(r).holds(panel)) continue;
                const int64_t block = std::min<int64_t>(kTileRows, rows - r), at = r * kColumns + panel;
                multiply<C>(block, left_s + r * dim_s, dim_s, right_s.column_panel(column + panel), dim_s, s + at,
                            kColumns, false);
                multiply<C>(block, left_dp + r * dim_dp, dim_dp, right_dp.column_panel(column + panel), dim_dp, dp + at,
                            kColumns, false);
            }
        }
    }

    uint8_t* dropout(int64_t b, int64_t h, int64_t i0, int64_t i1, int64_t j0, int64_t j1, Tile& tile) {
        if (p_.dropout_threshold == 0) return nullptr;
        tile.keep.resize(static_cast<size_t>(kColumns * kColumns));
        dropout_tile(p_, b, h, i0, std::min(i1, p_.seqlen_q), j0, std::min(j1, p_.seqlen_k), tile.keep.data(),
                     kColumns);
        return tile.keep.data();
    }

    void dq_tile(int64_t b, int64_t h, int64_t first, const Head& head, Tile& tile) {
        const int64_t rows = std::min(kQueryTile, p_.seqlen_q - first), dim = head.k.padded_dim();
        C* s = tile.s.reserve(kQueryTile * kColumns);
        C* dp = tile.dp.reserve(kQueryTile * kColumns);
        C* dq = tile.sum.reserve(kQueryTile * dim);
        std::fill(dq, dq + rows * dim, C(0));
        const bool careful = head.k_non_finite && scores_.restricted();
        const int64_t end = scores_.key_high(first + rows - 1);
        for (int64_t j = scores_.key_low(first) / kColumns * kColumns; j < end; j += kColumns) {
            const int64_t j_end = std::min(j + kColumns, head.k.padded_seq());
            const auto span = [&](int64_t r) {
                const int64_t last = std::min(r + kTileRows, rows) - 1;
                return Span<C>(scores_.key_low(first + r), scores_.key_high(first + last), j, j_end);
            };
            products(rows, head.q.row(first), p_.head_dim_qk, head.k, head.dout.row(first), p_.head_dim_v, head.v, j,
                     j_end - j, span, s, dp);
            const uint8_t* keep = dropout(b, h, first, first + rows, j, j_end, tile);
            for (int64_t r = 0; r < rows; ++r) {
                const Span<C> columns = span(r / kTileRows * kTileRows);
                if (columns.empty()) continue;
                const int64_t i = first + r, at = r * kColumns + columns.first;
                scores_.template finish_row<false>(s + at, b, h, i, j + columns.first, j + columns.last,
                                                   scores_.key_low(i), scores_.key_high(i));
                gradient_row<false>(s + at, dp + at, columns.last - columns.first, &head.lse[static_cast<size_t>(i)],
                                    &head.delta[static_cast<size_t>(i)], keep == nullptr ? nullptr : keep + at, 1);
                add_dbias_of_query(b, h, i, j + columns.first, std::min(j + columns.last, p_.seqlen_k), s + at);
            }
            for (int64_t r = 0; r < rows; r += kTileRows) {
                const Span<C> columns = span(r);
                if (columns.empty()) continue;
                accumulate(careful, std::min<int64_t>(kTileRows, rows - r), s + r * kColumns + columns.first, head.k,
                           j + columns.first, columns.last - columns.first, dq + r * dim);
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            write_row<C, T>(dq + r * dim, static_cast<C>(p_.softmax_scale), p_.head_dim_qk,
                            at_mutable<T>(p_.dq, b, h, first + r), p_.dq.stride[3]);
        }
    }

    void dkdv_tile(int64_t b, int64_t h, int64_t first, Head& head, bool first_of_group, bool last_of_group,
                   Tile& tile) {
        const int64_t rows = std::min(kKeyRows, p_.seqlen_k - first);
        const int64_t dim_k = head.k.padded_dim(), dim_v = head.v.padded_dim();
        C* s = tile.s.reserve(kKeyRows * kColumns);
        C* dp = tile.dp.reserve(kKeyRows * kColumns);
        C* dk = head.dk.get() + first * dim_k;
        C* dv = head.dv.get() + first * dim_v;
        if (first_of_group) {
            std::fill(dk, dk + rows * dim_k, C(0));
            std::fill(dv, dv + rows * dim_v, C(0));
        }
        const bool restricted = scores_.restricted();
        const int64_t end = scores_.query_high(first + rows - 1);
        for (int64_t i = scores_.query_low(first) / kColumns * kColumns; i < end; i += kColumns) {
            const int64_t i_end = std::min(i + kColumns, head.q.padded_seq());
            const auto span = [&](int64_t r) {
                const int64_t last = std::min(r + kTileRows, rows) - 1;
                return Span<C>(scores_.query_low(first + r), scores_.query_high(first + last), i, i_end);
            };
            products(rows, head.k.row(first), p_.head_dim_qk, head.q, head.v.row(first), p_.head_dim_v, head.dout, i,
                     i_end - i, span, s, dp);
            const uint8_t* keep = dropout(b, h, i, i_end, first, first + rows, tile);
            for (int64_t r = 0; r < rows; ++r) {
                const Span<C> columns = span(r / kTileRows * kTileRows);
                if (columns.empty()) continue;
                const int64_t j = first + r, at = r * kColumns + columns.first;
                const size_t query = static_cast<size_t>(i + columns.first);
                scores_.template finish_row<true>(s + at, b, h, j, i + columns.first, i + columns.last,
                                                  scores_.query_low(j), scores_.query_high(j));
                gradient_row<true>(s + at, dp + at, columns.last - columns.first, &head.lse[query], &head.delta[query],
                                   keep == nullptr ? nullptr : keep + columns.first * kColumns + r, kColumns);
                add_dbias_of_key(b, h, j, first / kKeyRows, i + columns.first, std::min(i + columns.last, p_.seqlen_q),
                                 s + at);
            }
            for (int64_t r = 0; r < rows; r += kTileRows) {
                const Span<C> columns = span(r);
                if (columns.empty()) continue;
                const int64_t block = std::min<int64_t>(kTileRows, rows - r), at = r * kColumns + columns.first;
                const int64_t depth = columns.last - columns.first, query = i + columns.first;
                accumulate(restricted && head.q_non_finite, block, s + at, head.q, query, depth, dk + r * dim_k);
                accumulate(restricted && head.dout_non_finite, block, dp + at, head.dout, query, depth, dv + r * dim_v);
            }
        }
        if (!last_of_group) return;
        const int64_t head_k = h / (p_.heads_q / p_.heads_k);
        for (int64_t r = 0; r < rows; ++r) {
            write_row<C, T>(dk + r * dim_k, static_cast<C>(p_.softmax_scale), p_.head_dim_qk,
                            at_mutable<T>(p_.dk, b, head_k, first + r), p_.dk.stride[3]);
            write_row<C, T>(dv + r * dim_v, C(1), p_.head_dim_v, at_mutable<T>(p_.dv, b, head_k, first + r),
                            p_.dv.stride[3]);
        }
    }

    // The bias's gradient, in the compute type and the bias's own shape. Where the bias has a row per query, tiles of
    // queries own its rows; where it is broadcast over queries, tiles of keys own its columns; where it is broadcast
    // over both, each tile of keys owns a partial sum. Heads that share it take their turns in order.
    bool wants_dbias() const { return p_.dbias.data != nullptr; }
    bool per_query() const { return p_.bias_shape[2] != 1; }
    bool bias_shared_by_heads() const {
        return wants_dbias() && ((p_.bias_shape[0] == 1 && p_.batch > 1) || (p_.bias_shape[1] == 1 && p_.heads_q > 1));
    }
    int64_t dbias_columns() const {
        if (p_.bias_shape[3] != 1) return p_.bias_shape[3];
        return per_query() ? 1 : count(p_.seqlen_k, kKeyRows);
    }
    C* dbias_row(int64_t b, int64_t h, int64_t i) {
        b = p_.bias_shape[0] == 1 ? 0 : b, h = p_.bias_shape[1] == 1 ? 0 : h, i = per_query() ? i : 0;
        return dbias_.data() + ((b * p_.bias_shape[1] + h) * p_.bias_shape[2] + i) * dbias_columns();
    }

    void start_dbias() {
        if (!wants_dbias()) return;
        dbias_.assign(static_cast<size_t>(p_.bias_shape[0] * p_.bias_shape[1] * p_.bias_shape[2] * dbias_columns()),
                      C(0));
    }

    static C sum_of_row(const C* ds, int64_t n) {
        Vector<C> sum{};
        int64_t c = 0;
        for (; c + kLanes<C> <= n; c += kLanes<C>) sum += load<C>(ds + c);
        C total = sum_of<C>(sum);
        for (; c < n; ++c) total += ds[c];
        return total;
    }

    void add_dbias_of_query(int64_t b, int64_t h, int64_t i, int64_t j, int64_t j_end, const C* ds) {
        if (!wants_dbias() || !per_query()) return;
        C* row = dbias_row(b, h, i);
        if (p_.bias_shape[3] == 1) {
            *row += sum_of_row(ds, j_end - j);
        } else {
            for (int64_t c = 0; c < j_end - j; ++c) row[j + c] += ds[c];
        }
    }

    void add_dbias_of_key(int64_t b, int64_t h, int64_t j, int64_t tile, int64_t i, int64_t i_end, const C* ds) {
        if (!wants_dbias() || per_query()) return;
        C* to = dbias_row(b, h, 0) + (p_.bias_shape[3] == 1 ? tile : j);
        *to += sum_of_row(ds, i_end - i);
    }

    template <typename B>
    void write_dbias() {
        const int64_t* shape = p_.bias_shape;
        for (int64_t b = 0; b < shape[0]; ++b) {
            for (int64_t h = 0; h < shape[1]; ++h) {
                for (int64_t i = 0; i < shape[2]; ++i) {
                    C* row = dbias_row(b, h, i);
                    if (shape[3] == 1) {
                        for (int64_t c = 1; c < dbias_columns(); ++c) row[0] += row[c];
                    }
                    write_row<C, B>(row, C(1), shape[3], at_mutable<B>(p_.dbias, b, h, i), p_.dbias.stride[3]);
                }
            }
        }
    }

    void finish_dbias() {
        if (!wants_dbias()) return;
        switch (p_.bias_dtype) {
            case DType::kFloat16:
                return write_dbias<Half>();
            case DType::kBFloat16:
                return write_dbias<BFloat16>();
            case DType::kFloat32:
                return write_dbias<float>();
            case DType::kFloat64:
                return write_dbias<double>();
        }
    }

    const AttentionParams& p_;
    const Scores<C> scores_;
    std::vector<C> dbias_;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
