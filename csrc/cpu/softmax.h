// One row of the online softmax.
#pragma once

#include "scores.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

template <typename C>
inline void scale_row(C* row, C factor, int64_t n) {
    for (int64_t d = 0; d < n; ++d) row[d] *= factor;
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

// Turns row `r` of scores, t = scale · s, into weights exp(t - top), `top` being the row's maximum so far, which this
// updates with `sum`. Returns the factor for what was summed before. keep: dropout's choice, or null.
template <typename P, typename C>
inline C softmax_row(C* row, int64_t r, const Span& span, C scale, const uint8_t* keep, typename P::Weights& weights,
                     C& top, C& sum) {
    constexpr int L = kLanes<C>, kVectors = P::Weights::kVectors;
    const C before = top;
    const C highest = scale * largest(row, span.first, span.last);
    top = highest > before ? highest : before;
    // Nothing seen yet: 0 in place of -inf, so that -inf - top is -inf, and a NaN stays one.
    const C base = top == -kInfinity<C> ? C(0) : top;
    const Vector<C> minus = splat(-base), factor = splat(scale);
    Vector<C> part[4] = {};
    int64_t c = span.first;
    const auto step = [&](Vector<C>& total) {
        Vector<C> w[kVectors];
#pragma GCC unroll 2
        for (int u = 0; u < kVectors; ++u) {
            w[u] = exp<C>(load<C>(row + c + u * L) * factor + minus);
            total += w[u];
        }
        if (keep != nullptr) {
            for (int u = 0; u < kVectors; ++u) {
                for (int i = 0; i < L; ++i) w[u][i] = keep[c + u * L + i] ? w[u][i] : C(0);
            }
        }
        weights.put(r, c, w);
        c += kVectors * L;
    };
    while (c + 4 * kVectors * L <= span.last) {
        step(part[0]);
        step(part[1]);
        step(part[2]);
        step(part[3]);
    }
    while (c < span.last) step(part[0]);
    const C rescale = before == top ? C(1) : exp_of<C>(before - base);
    sum = sum * rescale + sum_of<C>((part[0] + part[1]) + (part[2] + part[3]));
    return rescale;
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
