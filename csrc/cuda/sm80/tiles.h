// The one table of tile sizes, with the reason for each row.
//
// All configurations stay within the 99 KiB of shared memory that a block has on the smallest devices (8.6, 8.9, 12.0),
// so that every row runs on every device. None has been timed yet.
#pragma once

namespace fastattn::cuda::sm80 {

struct ForwardTile {
    int queries, keys, warps;  // of a block; a warp owns queries / warps rows, a multiple of 16
    constexpr int threads() const { return 32 * warps; }
    constexpr int blocks() const { return queries / (16 * warps); }  // of 16 rows, for each warp
    // The tile of Q, and two stages of K and of V.
    constexpr int shared_bytes(int head_dim) const { return 2 * head_dim * (queries + 4 * keys); }
};

// 32 rows a warp use each fragment of K and V twice, which halves the shared memory traffic, the limit at 16 rows. From
// head_dim 128 on the accumulators of 32 rows leave too few registers.
constexpr ForwardTile forward_tile(int head_dim) {
    if (head_dim <= 32) return {128, 64, 4};   // 24 KiB
    if (head_dim <= 64) return {128, 64, 4};   // 48 KiB, two blocks on an SM of 100 KiB
    if (head_dim <= 96) return {128, 32, 4};   // 48 KiB; as below
    if (head_dim <= 128) return {128, 64, 8};  // 96 KiB; 16 rows a warp: 32 take more registers than there are
    if (head_dim <= 192) return {128, 32, 8};  // 96 KiB
    return {64, 32, 4};                        // 96 KiB; 128 rows would take 128 KiB
}

// The general kernel (masks, biases, dropout, any strides, packed heads, few queries) keeps addresses and flags in
// registers as well: 16 rows a warp.
constexpr ForwardTile general_forward_tile(int head_dim) {
    if (head_dim <= 64) return {64, 64, 4};   // 40 KiB
    if (head_dim <= 128) return {64, 64, 4};  // 80 KiB
    return {64, 16, 4};                       // 64 KiB
}

struct KeyTile {
    int queries, keys, warps;  // of one step, of the block
    constexpr int threads() const { return 32 * warps; }
    // A warp owns 16 keys and, where there are more warps than that needs, one of `groups` parts of the columns.
    constexpr int groups() const { return warps * 16 / keys; }
    // K, V, two stages of Q, one of dO, dS, with several groups P, and two stages of each query's lse and delta.
    constexpr int shared_bytes(int head_dim) const {
        return 2 * head_dim * (2 * keys + 3 * queries) + 2 * keys * queries * (groups() > 1 ? 2 : 1) + 16 * queries;
    }
};

// The backward pass over tiles of keys, dK and dV in registers: 16 keys a warp is what fits there. Many keys make few
// additions to dQ, whose traffic is seqlen_q * seqlen_k * head_dim / keys floats a head.
constexpr KeyTile key_tile(int head_dim) {
    if (head_dim <= 32) return {64, 128, 8};   // 45 KiB
    if (head_dim <= 64) return {64, 128, 8};   // 73 KiB
    if (head_dim <= 96) return {32, 128, 8};   // 75 KiB; 64 queries would take 101 KiB
    if (head_dim <= 128) return {32, 128, 8};  // 97 KiB
    if (head_dim <= 192) return {32, 64, 8};   // 93 KiB; dK and dV of 16 keys in two warps
    return {32, 32, 4};                        // 85 KiB; 64 keys would take 104 KiB
}

// With addresses and flags of single entries in registers as well there is room for fewer queries at a time.
constexpr KeyTile general_key_tile(int head_dim) {
    if (head_dim <= 64) return {32, 128, 8};   // 54 KiB
    if (head_dim <= 128) return {16, 128, 8};  // 81 KiB
    return key_tile(head_dim);
}

// The separate pass over tiles of queries for a dQ of one order of summation: Q, dO, and two stages of K and of V.
constexpr ForwardTile query_tile(int head_dim) {
    if (head_dim <= 64) return {64, 64, 4};   // 48 KiB
    if (head_dim <= 192) return {64, 32, 4};  // 96 KiB and less
    return {64, 16, 4};                       // 96 KiB
}
constexpr int query_tile_bytes(int head_dim) {
    return 2 * head_dim * (2 * query_tile(head_dim).queries + 4 * query_tile(head_dim).keys);
}

constexpr bool all_fit(int head_dim) {
    constexpr int kMost = 99 << 10;
    return forward_tile(head_dim).shared_bytes(head_dim) <= kMost &&
           general_forward_tile(head_dim).shared_bytes(head_dim) <= kMost &&
           key_tile(head_dim).shared_bytes(head_dim) <= kMost &&
           general_key_tile(head_dim).shared_bytes(head_dim) <= kMost && query_tile_bytes(head_dim) <= kMost;
}
static_assert(all_fit(32) && all_fit(64) && all_fit(96) && all_fit(128) && all_fit(192) && all_fit(256));

}  // namespace fastattn::cuda::sm80
