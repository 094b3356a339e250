// Many mutants in one library: each stands beside what it changes, and one of them is switched on at run time.
//
// Where none is, it is noted which would have made a difference: a comparison that came out otherwise, a constant or a
// synchronisation that was reached. tests/cuda_emulation/mutants.py writes calls of these into the kernels' sources.
#pragma once

#include "emulator/api.h"

namespace fastattn::mutation {

constexpr int kMost = 1 << 14;
extern int active;  // -1: none
extern unsigned char matters[kMost];

inline bool on(int id) {
    matters[id] = 1;
    return active == id;
}
template <typename T>
T literal(int id, T is, T becomes) {
    return on(id) ? becomes : is;
}
inline bool choose(int id, bool is, bool becomes) {
    if (is != becomes) matters[id] = 1;
    return active == id ? becomes : is;
}

enum class Kind { kLess, kLessEqual, kGreater, kGreaterEqual, kEqual };
template <int kId, Kind kKind>
struct Comparison {};
template <typename Left, int kId, Kind kKind>
struct Half {
    Left left;
};

// a < less<17> > b for a < b; likewise the others: operators of the same precedence as what they take the place of.
template <int kId>
inline constexpr Comparison<kId, Kind::kLess> less{};
template <int kId>
inline constexpr Comparison<kId, Kind::kLessEqual> less_equal{};
template <int kId>
inline constexpr Comparison<kId, Kind::kGreater> greater{};
template <int kId>
inline constexpr Comparison<kId, Kind::kGreaterEqual> greater_equal{};
template <int kId>
inline constexpr Comparison<kId, Kind::kEqual> equal{};

template <typename Left, int kId, Kind kKind>
Half<Left, kId, kKind> operator<(Left left, Comparison<kId, kKind>) {
    return {left};
}
template <typename Left, int kId>
Half<Left, kId, Kind::kEqual> operator==(Left left, Comparison<kId, Kind::kEqual>) {
    return {left};
}
template <typename Left, int kId, Kind kKind, typename Right>
bool operator>(Half<Left, kId, kKind> x, Right right) {
    const bool equal = x.left == right;
    switch (kKind) {
        case Kind::kLess:
            return choose(kId, x.left < right, x.left < right || equal);
        case Kind::kLessEqual:
            return choose(kId, x.left <= right, x.left <= right && !equal);
        case Kind::kGreater:
            return choose(kId, x.left > right, x.left > right || equal);
        default:
            return choose(kId, x.left >= right, x.left >= right && !equal);
    }
}
template <typename Left, int kId, typename Right>
bool operator==(Half<Left, kId, Kind::kEqual> x, Right right) {
    return choose(kId, x.left == right, x.left != right);
}

// a ^ exclusive_or<17> ^ b for a ^ b, or a + b.
template <int kId>
struct ExclusiveOr {};
template <int kId>
inline constexpr ExclusiveOr<kId> exclusive_or{};
template <typename Left, int kId>
Half<Left, kId, Kind::kEqual> operator^(Left left, ExclusiveOr<kId>) {
    return {left};
}
template <typename Left, int kId, typename Right>
auto operator^(Half<Left, kId, Kind::kEqual> x, Right right) {
    if ((x.left ^ right) != x.left + right) matters[kId] = 1;
    return active == kId ? x.left + right : x.left ^ right;
}

// left && right, or left || right.
template <typename Right>
bool both(int id, bool left, const Right& right) {
    if (active == id) return left || right();
    if (active >= 0) return left && right();
    return left ? choose(id, right(), true) : (matters[id] = 1, false);  // right may not be fit to be looked at
}

inline bool barrier_or(int id, bool condition, cuda::emulation::Where where = cuda::emulation::Where::here()) {
    return on(id) ? condition : cuda::emulation::barrier_or(condition, where);
}
inline int min32(int id, int a, int b) { return a == b ? a : (on(id) == (a < b) ? b : a); }
inline int max32(int id, int a, int b) { return a == b ? a : (on(id) == (a > b) ? b : a); }

}  // namespace fastattn::mutation
