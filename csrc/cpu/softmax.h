// The online softmax of a block of rows.
#pragma once

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

// weights = exp(scale · row - base) for columns [first, last), with dropout's choice where kDropout; adds to sum.
template <typename P, bool kDropout, typename C>
inline void exponentials(const C* row, int64_t r, const Span& span, C scale, C base, const uint8_t* keep,
                         typename P::Weights& weights, Vector<C>& sum) {
    constexpr int L = kLanes<C>, kVectors = P::Weights::kVectors, kUnroll = 4 / kVectors;
    const Vector<C> minus = splat(-base), factor = splat(scale);
    Vector<C> part[4] = {};
    const auto step = [&](int64_t c, Vector<C>* total) __attribute__((always_inline)) {
        Vector<C> w[kVectors];
#pragma GCC unroll 2
        for (int u = 0; u < kVectors; ++u) {
            w[u] = exp<C>(load<C>(row + c + u * L) * factor + minus);
            total[u] += w[u];
            if constexpr (kDropout) w[u] = kept_only<C>(w[u], keep + c + u * L);
        }
        weights.put(r, c, w);
    };
    int64_t c = span.first;
    for (; c + 4 * L <= span.last; c += 4 * L) {
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) step(c + u * kVectors * L, part + u * kVectors);
    }
    for (; c < span.last; c += kVectors * L) step(c, part);
    sum += (part[0] + part[1]) + (part[2] + part[3]);
}

// Turns rows of scores t = scale · s into weights exp(t - top), top being each row's maximum so far, and scales what
// was summed before, `out` (rows x dim) included. keep: dropout's choice, or null.
template <typename P, typename C>
inline void softmax_block(const C* s, int64_t rows, const Span& span, C scale, const uint8_t* keep,
                          typename P::Weights& weights, C* top, Vector<C>* sum, C* out, int64_t dim) {
    constexpr int L = kLanes<C>;
    constexpr int64_t kMost = (P::kRowBlock + L - 1) / L * L;
    C base[kMost] = {}, rescale[kMost] = {};
    for (int64_t r = 0; r < rows; ++r) {
        const C before = top[r], highest = scale * largest(s + r * P::kKeyTile, span.first, span.last);
        top[r] = highest > before ? highest : before;
        // Nothing seen yet: 0 in place of -inf, so that -inf - top is -inf, and a NaN stays one.
        base[r] = top[r] == -kInfinity<C> ? C(0) : top[r];
        rescale[r] = before - base[r];
    }
    for (int64_t r = 0; r < rows; r += L) store<C>(rescale + r, exp<C>(load<C>(rescale + r)));
    for (int64_t r = 0; r < rows; ++r) {
        sum[r] *= splat(rescale[r]);
        if (rescale[r] != 1) scale_row(out + r * dim, rescale[r], dim);
        if (keep == nullptr) {
            exponentials<P, false>(s + r * P::kKeyTile, r, span, scale, base[r], keep, weights, sum[r]);
        } else {
            exponentials<P, true>(s + r * P::kKeyTile, r, span, scale, base[r], keep + r * P::kKeyTile, weights,
                                  sum[r]);
        }
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
