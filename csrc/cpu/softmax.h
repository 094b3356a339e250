// The online softmax of a block of rows.
#pragma once

#include <vector>

#include "scores.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

template <typename C>
inline void scale_row(C* row, C factor, int64_t n) {
    const Vector<C> f = splat(factor);
    for (int64_t d = 0; d < n; d += kLanes<C>) store<C>(row + d, load<C>(row + d) * f);
}

template <typename C>
inline C lse_of(C top, C sum) {
    const double base = static_cast<double>(top == -kInfinity<C> ? C(0) : top);
    return static_cast<C>(base + std::log(static_cast<double>(sum)));
}

// The largest of row[first .. last), whole vectors; a NaN may be passed over.
template <typename C>
inline C largest(const C* row, int64_t first, int64_t last) {
    constexpr int L = kLanes<C>;
    Vector<C> top[4];
    for (auto& t : top) t = splat(-kInfinity<C>);
    int64_t c = first;
    for (; c + 4 * L <= last; c += 4 * L) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) top[u] = larger<C>(load<C>(row + c + u * L), top[u]);
    }
    for (; c < last; c += L) top[0] = larger<C>(load<C>(row + c), top[0]);
    return max_of<C>(larger<C>(larger<C>(top[0], top[1]), larger<C>(top[2], top[3])));
}

template <typename C>
inline const C* sink_of(const AttentionParams& p, int64_t h) {
    return p.sinks.data == nullptr ? nullptr : static_cast<const C*>(p.sinks.data) + h * p.sinks.stride[0];
}

// What the rows of a tile have seen so far: the largest score, and the weights' sum relative to it, in lanes.
template <typename C, int kMost>
struct Totals {
    C top[kMost];
    Vector<C> sum[kMost];

    // A sink is what a row has seen before its first key: a score that has a weight, and no value.
    void start(int64_t rows, const C* sink) {
        const bool seen = sink != nullptr && *sink != -kInfinity<C>;
        for (int64_t r = 0; r < rows; ++r) {
            top[r] = seen ? *sink : -kInfinity<C>;
            sum[r] = Vector<C>{};
            sum[r][0] = seen ? C(1) : C(0);
        }
    }
};

// Rows [row, row + rows) of a tile of queries by columns `span` of the keys from `key` on.
struct Block {
    int64_t row, rows, key;
    Span span;
    bool plain;  // the scores are the products times the call's scale
};

// What a tile of queries of one head and its keys are computed from and into.
template <typename P>
struct Operands {
    using C = typename P::C;
    const typename P::Matrix &q, &k, &v;
    bool careful;    // v holds inf or NaN, and some query may not see it
    C scale;         // of plain blocks
    C* out;          // (rows, padded dim of v), 0 at first
    C* top;          // each row's largest score so far
    Vector<C>* sum;  // of each row's weights, in lanes
    Ahead* ahead;    // what products may ask for meanwhile
};

// e^x for a weight, x <= 0 being a score less its row's largest. x log2(e) is rounded and becomes n + f; 2^f is the
// minimax polynomial of degree 5 that is 1 at 0. Fewer operations than exp's, and a relative error below 2^-22 + |x|
// 2^-23, where the rounding of x itself costs |x| 2^-24; beside the row's largest weight, 1, it is below 2^-22 for
// every x.
template <typename C>
inline Vector<C> weight_of(Vector<C> x) {
    if constexpr (sizeof(C) == 8) {
        return exp<C>(x);
    } else {
        const Vector<C> y = x * splat<C>(C(kLog2E)), round = splat<C>(Exp2<C>::kRound);
        const Vector<C> shifted = y + round, n = shifted - round, f = y - n;
        Vector<C> p = splat<C>(1.32695213e-3f);
        for (const C c : {9.67129134e-3f, 5.55071086e-2f, 2.40222469e-1f, 6.93147004e-1f, 1.0f})
            p = p * f + splat<C>(c);
        return times_power<C>(p, x, n, shifted);
    }
}

// row = exp(scale · row - base) for columns [first, last), with dropout's choice where kDropout; adds to sum.
template <bool kDropout, typename C>
inline void exponentials(C* row, const Span& span, C scale, C base, const uint8_t* keep, Vector<C>& sum) {
    constexpr int L = kLanes<C>;
    const Vector<C> minus = splat(-base), factor = splat(scale);
    Vector<C> part[4] = {};
    const auto step = [&](int64_t c, Vector<C>& total) __attribute__((always_inline)) {
        Vector<C> w = weight_of<C>(load<C>(row + c) * factor + minus);
        total += w;
        if constexpr (kDropout) w = kept_only<C>(w, keep + c);
        store<C>(row + c, w);
    };
    int64_t c = span.first;
    for (; c + 4 * L <= span.last; c += 4 * L) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) step(c + u * L, part[u]);
    }
    for (; c < span.last; c += L) step(c, part[0]);
    sum += (part[0] + part[1]) + (part[2] + part[3]);
}

// Blocks one after the other: scores, their softmax in place, their part of the output.
template <typename P>
class BlocksInTurn {
    using C = typename P::C;

public:
    // finish(block, s): turns products into scores in place where a block is not plain. keep(block): dropout's choice,
    // or null. s and keep have kKeyTile columns and begin at the block's row and key.
    template <typename Finish, typename Keep>
    void run(const Operands<P>& o, const std::vector<Block>& blocks, const Finish& finish, const Keep& keep) {
        C* s = s_.reserve(P::kQueryBlock * P::kKeyTile);
        const int64_t dim = o.v.padded_dim();
        for (const Block& b : blocks) {
            P::scores(o.q, b.row, b.rows, o.k, b.key, b.span.first, b.span.last, s, P::kKeyTile, o.ahead);
            if (!b.plain) finish(b, s);
            softmax(o, b, s, keep(b));
            const int64_t depth = std::min(b.span.last, o.v.seq - b.key) - b.span.first;
            P::accumulate(o.careful, b.rows, {s + b.span.first, P::kKeyTile, 1}, o.v, b.key + b.span.first, depth,
                          o.out + b.row * dim, o.ahead);
        }
    }

private:
    // Turns rows of scores t = scale · s into weights exp(t - top), top being each row's maximum so far, and scales
    // what was summed before, the output included.
    static void softmax(const Operands<P>& o, const Block& b, C* s, const uint8_t* keep) {
        constexpr int L = kLanes<C>;
        constexpr int64_t kMost = (P::kQueryBlock + L - 1) / L * L;
        const C scale = b.plain ? o.scale : C(1);
        const int64_t dim = o.v.padded_dim();
        C base[kMost] = {}, rescale[kMost] = {};
        for (int64_t r = 0; r < b.rows; ++r) {
            C& top = o.top[b.row + r];
            const C before = top, highest = scale * largest(s + r * P::kKeyTile, b.span.first, b.span.last);
            top = highest > before ? highest : before;
            // Nothing seen yet: 0 in place of -inf, so that -inf - top is -inf, and a NaN stays one.
            base[r] = top == -kInfinity<C> ? C(0) : top;
            rescale[r] = before == -kInfinity<C> ? C(0) : before - base[r];  // nothing seen: nothing to scale
        }
        for (int64_t r = 0; r < b.rows; r += L) store<C>(rescale + r, exp<C>(load<C>(rescale + r)));
        for (int64_t r = 0; r < b.rows; ++r) {
            Vector<C>& sum = o.sum[b.row + r];
            sum *= splat(rescale[r]);
            if (rescale[r] != 1) scale_row(o.out + (b.row + r) * dim, rescale[r], dim);
            C* row = s + r * P::kKeyTile;
            if (keep == nullptr) {
                exponentials<false>(row, b.span, scale, base[r], keep, sum);
            } else {
                exponentials<true>(row, b.span, scale, base[r], keep + r * P::kKeyTile, sum);
            }
        }
    }

    Buffer<C> s_;
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
