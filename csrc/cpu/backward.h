// Backward, by recomputation: with P = exp(S - lse) and delta = rowsum(dO ∘ O),
//   dV = (P ∘ D)ᵀ dO,   dS = P ∘ (D ∘ dO Vᵀ - delta + dlse),   dQ = scale · dS K,   dK = scale · dSᵀ Q,   dbias = dS,
// D being dropout's factors. Work goes by tiles of keys, which own their rows of dK and dV; a tile's part of dQ is
// added when all earlier tiles have added theirs. Every sum has one order, so nothing depends on the number of threads.
#pragma once

#include <atomic>
#include <stdexcept>
#include <vector>

#include "schedule.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

template <typename P>
class Backward {
    using T = typename P::T;
    using C = typename P::C;

public:
    explicit Backward(const AttentionParams& params) : p_(params), scores_(params) {}

    void run() {
        start_dbias();
        for_each_key_head<Head>(p_, bias_shared_by_heads(), [&](int64_t b, int64_t head_k, Head& head, const Run& run) {
            const Entry entry(p_, b);
            start_head(entry, head_k, head, run);
            const int64_t group = p_.heads_q / p_.heads_k;
            for (int64_t g = 0; g < group; ++g) {
                const int64_t h = head_k * group + g;
                start_query_head(entry, h, head, run);
                run(count_of(entry.seqlen_k, kKeyRows), [&](int64_t item) {  // causal: the longest first
                    try {
                        key_tile(entry, h, item, head, g == 0, g == group - 1, scratch<Tile>());
                    } catch (...) {
                        head.failed = true;  // those who wait for this tile's part of dQ must not wait for ever
                        throw;
                    }
                });
                run(count_of(entry.seqlen_q, kPackRows),
                    [&](int64_t item) { write_dq(entry, h, item * kPackRows, head); });
                if (wants_dbias() && !dbias_per_key()) add_dbias_of_rows(entry, h, head);
            }
        });
        finish_dbias();
    }

private:
    static constexpr int64_t kKeyRows = P::kKeyRows, kColumns = P::kQueryColumns, kRowBlock = P::kRowBlock;
    static constexpr int64_t kBlocks = kKeyRows / kRowBlock, kMostRows = P::kMostRows;

    struct Head {
        typename P::Matrix k, v, q, dout;
        Buffer<C> dk, dv;                        // (seqlen_k, padded dim), summed over the query heads of the group
        Buffer<C> dq;                            // of one query head
        std::vector<C> lse, delta, dlse;         // per query, padded; lse is +inf where nothing is seen
        std::vector<C> ds_sums;                  // of dS over the keys, per query; where sums_rows()
        std::vector<std::atomic<int64_t>> turn;  // per tile of queries: the tile of keys that may add to dq
        std::atomic<bool> failed{false}, k_non_finite{false}, q_non_finite{false}, dout_non_finite{false};
    };
    struct Tile {
        Buffer<C> slope, bias_ds, bias;
        Buffer<uint8_t> mask;
        typename P::Gradients gradients;
        std::vector<uint8_t> keep;
        C ds_sums[kColumns];  // of dS over the tile's keys
    };

    void start_head(const Entry& e, int64_t head_k, Head& head, const Run& run) {
        head.k.reserve(e.seqlen_k, p_.head_dim_qk, P::kKeyLayouts);
        head.v.reserve(e.seqlen_k, p_.head_dim_v, P::kValueLayouts);
        head.failed = head.k_non_finite = false;
        run(count_of(e.seqlen_k, kPackRows), [&](int64_t item) {
            const int64_t first = item * kPackRows;
            if (head.k.pack(key_rows<T>(p_, p_.k, e, head_k), first, P::kKeyLayouts)) head.k_non_finite = true;
            head.v.pack(key_rows<T>(p_, p_.v, e, head_k), first, P::kValueLayouts);
        });
        for (int64_t j = e.seqlen_k; j < e.capacity_k; ++j) {  // what is there and not used
            C nothing[kMaxHeadDim] = {};
            write_row<C, T>(nothing, C(0), p_.head_dim_qk, at_mutable<T>(p_.dk, e.batch_k, head_k, e.row_k + j),
                            p_.dk.stride[3]);
            write_row<C, T>(nothing, C(0), p_.head_dim_v, at_mutable<T>(p_.dv, e.batch_k, head_k, e.row_k + j),
                            p_.dv.stride[3]);
        }
        const int64_t rows = round_up(e.seqlen_k, kKeyRows);
        head.dk.reserve(rows * head.k.padded_dim());
        head.dv.reserve(rows * head.v.padded_dim());
    }

    void start_query_head(const Entry& e, int64_t h, Head& head, const Run& run) {
        head.q.reserve(e.seqlen_q, p_.head_dim_qk, P::kQueryLayouts);
        head.dout.reserve(e.seqlen_q, p_.head_dim_v, P::kQueryLayouts);
        head.q_non_finite = head.dout_non_finite = false;
        const size_t padded = static_cast<size_t>(round_up(e.seqlen_q, kColumns));
        head.lse.assign(padded, kInfinity<C>);
        head.delta.assign(padded, C(0));
        head.dlse.assign(padded, C(0));
        if (sums_rows()) head.ds_sums.assign(padded, C(0));
        const size_t tiles = padded / static_cast<size_t>(kColumns);
        if (head.turn.size() < tiles) head.turn = std::vector<std::atomic<int64_t>>(tiles);
        for (auto& turn : head.turn) turn.store(0, std::memory_order_relaxed);
        const int64_t dq_size = P::dq_size(e.seqlen_q, p_.head_dim_qk), pieces = count_of(e.seqlen_q, kPackRows);
        C* dq = head.dq.reserve(dq_size);
        run(pieces, [&](int64_t item) {
            std::fill(dq + dq_size * item / pieces, dq + dq_size * (item + 1) / pieces, C(0));
            const int64_t first = item * kPackRows, last = std::min(first + kPackRows, e.seqlen_q);
            const Rows<T> q = query_rows<T>(p_.q, e, h), dout = query_rows<T>(p_.grad_out, e, h);
            const Rows<T> out = query_rows<T>(p_.out, e, h);
            if (head.q.pack(q, first, P::kQueryLayouts)) head.q_non_finite = true;
            if (head.dout.pack(dout, first, P::kQueryLayouts)) head.dout_non_finite = true;
            for (int64_t i = first; i < last; i += kLanes<C>) {
                store<C>(head.delta.data() + i, row_products(out, dout, i, std::min<int64_t>(kLanes<C>, last - i)));
            }
            for (int64_t i = first; i < last; ++i) {
                const C lse = *at<C>(p_.lse, e.batch_q, h, e.row_q + i);
                head.lse[static_cast<size_t>(i)] = lse == -kInfinity<C> ? kInfinity<C> : lse;
                if (p_.grad_lse.data == nullptr) continue;
                head.dlse[static_cast<size_t>(i)] = *at<C>(p_.grad_lse, e.batch_q, h, e.row_q + i);
            }
        });
    }

    // The products x_i · y_i of `rows` rows from i on, each in a lane and summed in the order of dP's: where a query
    // sees one key, its output is a row of V, and dP and delta, large beside their difference, are rounded alike.
    Vector<C> row_products(const Rows<T>& x, const Rows<T>& y, int64_t i, int64_t rows) const {
        constexpr int64_t L = kLanes<C>;
        const int64_t dim = p_.head_dim_v, width = round_up(dim, L);
        C* copy = scratch<Buffer<C>>().reserve(2 * L * kMaxHeadDim);
        int64_t x_stride, y_stride;
        const C* x_rows = read_lanes(x, i, rows, dim, copy, x_stride);
        const C* y_rows = read_lanes(y, i, rows, dim, copy + L * width, y_stride);
        Vector<C> sum{};
        for (int64_t d = 0; d < width; d += L) {
            C x_columns[L * L], y_columns[L * L];
            transpose_square(x_rows + d, x_stride, x_columns, L);
            transpose_square(y_rows + d, y_stride, y_columns, L);
            for (int64_t k = 0; k < L; ++k) sum += load(x_columns + k * L) * load(y_columns + k * L);
        }
        return sum;
    }

    void write_dq(const Entry& e, int64_t h, int64_t first, Head& head) {
        C row[kMaxHeadDim];
        for (int64_t i = first; i < std::min(first + kPackRows, e.seqlen_q); ++i) {
            write_row<C, T>(P::dq_row(head.dq.get(), i, p_.head_dim_qk, row), static_cast<C>(p_.softmax_scale),
                            p_.head_dim_qk, at_mutable<T>(p_.dq, e.batch_q, h, e.row_q + i), p_.dq.stride[3]);
        }
    }

    void key_tile(const Entry& e, int64_t h, int64_t index, Head& head, bool first_of_group, bool last_of_group,
                  Tile& tile) {
        [[maybe_unused]] const typename P::Session session;
        const int64_t first = index * kKeyRows, rows = std::min(kKeyRows, e.seqlen_k - first);
        const int64_t dim_k = head.k.padded_dim(), dim_v = head.v.padded_dim();
        C* dk = head.dk.get() + first * dim_k;
        C* dv = head.dv.get() + first * dim_v;
        if (first_of_group) {
            std::fill(dk, dk + kKeyRows * dim_k, C(0));
            std::fill(dv, dv + kKeyRows * dim_v, C(0));
        }
        tile.gradients.reserve();
        const bool restricted = scores_.restricted();
        for (int64_t i = 0, query_tile = 0; i < e.seqlen_q; i += kColumns, ++query_tile) {
            const int64_t i_end = std::min(i + kColumns, e.seqlen_q);
            Span spans[kBlocks];
            int64_t low = kColumns, high = 0;
            for (int64_t r = 0; r < rows; r += kRowBlock) {
                Span& span = spans[r / kRowBlock];
                span = scores_.template span<true>(e, h, first + r, std::min(kRowBlock, rows - r), i, i_end, P::kUnit);
                if (!span.empty()) low = std::min(low, span.first), high = std::max(high, span.last);
            }
            if (sums_rows()) std::fill(tile.ds_sums, tile.ds_sums + kColumns, C(0));
            for (int64_t r = 0, block_rows = 0; r < rows && low < high; r += block_rows) {
                const Span& span = spans[r / kRowBlock];
                block_rows = kRowBlock;
                while (block_rows < kMostRows && r + block_rows < rows &&
                       span.joins(spans[(r + block_rows) / kRowBlock])) {
                    block_rows += kRowBlock;
                }
                block_rows = std::min(block_rows, rows - r);
                tile.gradients.clear(r, block_rows, low, span.empty() ? high : span.first);
                if (span.empty()) continue;
                tile.gradients.clear(r, block_rows, span.last, high);
                gradient_block(e, h, first, r, block_rows, i, i_end, span, head, tile);
                tile.gradients.add_dv(restricted && head.dout_non_finite, block_rows, span.first, span.last, head.dout,
                                      i, dv + r * dim_v);
                tile.gradients.add_dk(restricted && head.q_non_finite, r, block_rows, span.first, span.last, head.q, i,
                                      dk + r * dim_k);
            }
            std::atomic<int64_t>& turn = head.turn[static_cast<size_t>(query_tile)];
            for (int spin = 0; turn.load(std::memory_order_acquire) != index; ++spin) {
                if (head.failed) throw std::runtime_error("fastattn: another thread failed");
                wait_a_little(spin);
            }
            if (low < high) {
                for (int64_t c = low; c < high && sums_rows(); ++c) {
                    head.ds_sums[static_cast<size_t>(i + c)] += tile.ds_sums[c];
                }
                tile.gradients.add_dq(restricted && head.k_non_finite, rows, low, high, head.k, first, i,
                                      head.dq.get());
            }
            turn.store(index + 1, std::memory_order_release);
        }
        if (!last_of_group) return;
        const int64_t head_k = h / (p_.heads_q / p_.heads_k);
        for (int64_t r = 0; r < rows; ++r) {
            write_row<C, T>(dk + r * dim_k, static_cast<C>(p_.softmax_scale), p_.head_dim_qk,
                            at_mutable<T>(p_.dk, e.batch_k, head_k, e.row_k + first + r), p_.dk.stride[3]);
            write_row<C, T>(dv + r * dim_v, C(1), p_.head_dim_v,
                            at_mutable<T>(p_.dv, e.batch_k, head_k, e.row_k + first + r), p_.dv.stride[3]);
        }
    }

    // P ∘ D and dS of keys first + [r, r + rows) and queries i + [span.first, span.last).
    void gradient_block(const Entry& e, int64_t h, int64_t first, int64_t r, int64_t rows, int64_t i, int64_t i_end,
                        const Span& span, const Head& head, Tile& tile) {
        using G = typename P::Gradients;
        constexpr int L = kLanes<C>;
        C *const s = tile.gradients.s(), *const dp = tile.gradients.dp(r);
        P::scores(head.k, first + r, rows, head.q, i, span.first, span.last, s, kColumns);
        P::scores(head.v, first + r, rows, head.dout, i, span.first, span.last, dp, kColumns);
        const bool dropout = p_.dropout_threshold != 0;
        if (dropout) {
            tile.keep.resize(static_cast<size_t>(kMostRows * kColumns));
            Dropout(p_, e.b, h)
                .tile_transposed(i + span.first, std::min(i + span.last, i_end), first + r, first + r + rows,
                                 tile.keep.data() + span.first, kColumns);
        }
        const bool plain = span.whole && scores_.plain(), capped = p_.softcap != 0;
        const bool wants_ds = dbias_per_key() || sums_rows();
        C* bias_ds = wants_ds ? tile.bias_ds.reserve(kMostRows * kColumns) : nullptr;
        C* slope = capped ? tile.slope.reserve(kMostRows * kColumns) : nullptr;
        if (!plain) {
            GatheredRow<C> gathered = scores_.gather(e, h, first + r, rows, i + span.first,
                                                     std::min(i + span.last, i_end), kColumns, tile.bias, tile.mask);
            for (int64_t k = 0; k < rows; ++k) {
                scores_.template finish_row<true>(s + k * kColumns + span.first, e, h, first + r + k, i + span.first,
                                                  i + span.last, capped ? slope + k * kColumns + span.first : nullptr,
                                                  gathered);
                if (gathered.bias != nullptr) gathered.bias += kColumns;
                if (gathered.mask != nullptr) gathered.mask += kColumns;
            }
        }
        const Vector<C> factor = splat(plain ? scores_.scale : C(1)), nothing = splat(-kInfinity<C>), zero{};
        const Vector<C> kept = splat(static_cast<C>(p_.dropout_scale));
        const C* lse = head.lse.data() + i;
        const C *delta = head.delta.data() + i, *dlse = head.dlse.data() + i;
        for (int64_t k = 0; k < round_up(rows, G::kRows * G::kRowStep); ++k) {
            if (G::kRows > 1 && k % (G::kRows * G::kRowStep) >= G::kRowStep) continue;
            for (int64_t c = span.first; c < span.last; c += G::kVectors * L) {
                Vector<C> p[G::kRows][G::kVectors], ds[G::kRows][G::kVectors];
#pragma GCC unroll 2
                for (int a = 0; a < G::kRows; ++a) {
                    const int64_t row = k + a * G::kRowStep;
#pragma GCC unroll 2
                    for (int u = 0; u < G::kVectors; ++u) {
                        p[a][u] = ds[a][u] = zero;
                        if (row >= rows) continue;
                        const int64_t at = row * kColumns + c + u * L;
                        const Vector<C> t = load<C>(s + at);
                        Vector<C> weight = exp<C>(t * factor - load<C>(lse + c + u * L));
                        Vector<C> g = load<C>(dp + at);
                        Vector<C> dropped = weight;
                        if (!plain) weight = t == nothing ? zero : weight;
                        if (dropout) {
                            g = kept_only<C>(g * kept, tile.keep.data() + at);
                            dropped = kept_only<C>(weight * kept, tile.keep.data() + at);
                        } else {
                            dropped = weight;
                        }
                        p[a][u] = dropped;
                        const Vector<C> d = weight * (g - load<C>(delta + c + u * L) + load<C>(dlse + c + u * L));
                        ds[a][u] = plain ? d : weight == zero ? zero : d;
                    }
                }
                if (wants_ds) {
                    for (int a = 0; a < G::kRows; ++a) {
                        for (int u = 0; u < G::kVectors; ++u) {
                            const int64_t row = k + a * G::kRowStep;
                            if (row < rows) store<C>(bias_ds + row * kColumns + c + u * L, ds[a][u]);
                        }
                    }
                }
                for (int a = 0; a < G::kRows && capped; ++a) {
                    for (int u = 0; u < G::kVectors; ++u) {
                        const int64_t at = (k + a * G::kRowStep) * kColumns + c + u * L;
                        if (k + a * G::kRowStep < rows) {
                            ds[a][u] = ds[a][u] == zero ? zero : ds[a][u] * load<C>(slope + at);
                        }
                    }
                }
                tile.gradients.put(r, k, c, p, ds);
            }
        }
        if (dbias_per_key()) {
            add_dbias(e.b, h, first + r, rows, i + span.first, std::min(i + span.last, i_end), bias_ds + span.first);
        }
        for (int64_t k = 0; k < rows && sums_rows(); ++k) {
            for (int64_t c = span.first; c < span.last; ++c) tile.ds_sums[c] += bias_ds[k * kColumns + c];
        }
    }

    // The bias's gradient, in the compute type and the bias's own shape. Tiles of keys own its columns; where it is
    // broadcast over keys, its rows are known without them. Heads that share it take their turns in order.
    bool wants_dbias() const { return p_.dbias.data != nullptr; }
    bool dbias_per_key() const { return wants_dbias() && p_.bias_shape[3] != 1; }
    bool sums_rows() const { return wants_dbias() && !dbias_per_key() && p_.sinks.data != nullptr; }
    bool per_query() const { return p_.bias_shape[2] != 1; }
    bool bias_shared_by_heads() const {
        return wants_dbias() && ((p_.bias_shape[0] == 1 && p_.batch > 1) || (p_.bias_shape[1] == 1 && p_.heads_q > 1));
    }
    C* dbias_row(int64_t b, int64_t h, int64_t i) {
        b = p_.bias_shape[0] == 1 ? 0 : b, h = p_.bias_shape[1] == 1 ? 0 : h, i = per_query() ? i : 0;
        return dbias_.data() + ((b * p_.bias_shape[1] + h) * p_.bias_shape[2] + i) * p_.bias_shape[3];
    }

    void start_dbias() {
        if (!wants_dbias()) return;
        dbias_.assign(static_cast<size_t>(p_.bias_shape[0] * p_.bias_shape[1] * p_.bias_shape[2] * p_.bias_shape[3]),
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

    // Adds ds: keys [key, key + rows) x queries [i, i_end), rows kColumns apart.
    void add_dbias(int64_t b, int64_t h, int64_t key, int64_t rows, int64_t i, int64_t i_end, const C* ds) {
        const int64_t n = i_end - i;
        for (int64_t r = 0; r < rows; ++r, ds += kColumns) {
            C* to = dbias_row(b, h, i) + key + r;
            if (!per_query()) {
                *to += sum_of_row(ds, n);
            } else {
                for (int64_t c = 0; c < n; ++c) to[c * p_.bias_shape[3]] += ds[c];
            }
        }
    }

    // A bias that all keys of a query share changes lse and no weight: sum_j dS_ij = delta - (delta - dlse) sum_j P_ij
    // is dlse, and 0 for a row that sees nothing; a sum of dS would be of the rounding of its large, cancelling terms.
    // Beside a sink, which may leave the keys any small part of the weight, it is a sum that does not cancel.
    void add_dbias_of_rows(const Entry& e, int64_t h, const Head& head) {
        double total = 0;
        for (int64_t i = 0; i < e.seqlen_q; ++i) {
            const size_t n = static_cast<size_t>(i);
            if (head.lse[n] == kInfinity<C>) continue;
            const C nan_stays = (head.lse[n] - head.lse[n]) * head.delta[n];
            const C sum = sums_rows() ? head.ds_sums[n] : head.dlse[n] + nan_stays;
            if (per_query()) {
                *dbias_row(e.b, h, i) += sum;
            } else {
                total += static_cast<double>(sum);
            }
        }
        if (!per_query()) *dbias_row(e.b, h, 0) += static_cast<C>(total);
    }

    template <typename B>
    void write_dbias() {
        const int64_t* shape = p_.bias_shape;
        for (int64_t b = 0; b < shape[0]; ++b) {
            for (int64_t h = 0; h < shape[1]; ++h) {
                for (int64_t i = 0; i < shape[2]; ++i) {
                    write_row<C, B>(dbias_row(b, h, i), C(1), shape[3], at_mutable<B>(p_.dbias, b, h, i),
                                    p_.dbias.stride[3]);
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
            case DType::kE4M3:
                return;  // no bias is
        }
    }

    const AttentionParams& p_;
    const Scores<C> scores_;
    std::vector<C> dbias_;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
