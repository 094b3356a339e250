// The one table of tile sizes, with the reason for each row.
//
// A block has the multiprocessor to itself: 227 KiB of shared memory, 64 Ki registers. One warpgroup loads, the others
// own 64 queries each. None of this has been timed yet; sizes start from FlashAttention-3's, as far as the registers of
// this code allow.
#pragma once

namespace fastattn::cuda::sm90 {

struct ForwardTile {
    int queries, keys, stages;
    bool ping_pong;   // warpgroups take turns on the tensor cores, so that the softmax of one runs beside another's
                      // products
    bool persistent;  // as many blocks as multiprocessors, each with its share of the tiles; else one block a tile

    constexpr int consumers() const { return queries / 64; }
    constexpr int threads() const { return 128 * (consumers() + 1); }
    // Of each thread; together the 64 Ki of the multiprocessor. With three warpgroups that compute: 128 at entry.
    constexpr int consumer_registers() const { return consumers() == 3 ? 160 : 240; }
    constexpr int producer_registers() const { return consumers() == 3 ? 32 : 24; }
};

constexpr int value_dim(int head_dim) { return head_dim == 192 ? 128 : head_dim; }

// Variants 0 and 1 are what calls get, with sequences of different lengths always 1. Those after them are for timing,
// compiled where FASTATTN_SM90_VARIANTS=1 at the build and chosen by FASTATTN_SM90_VARIANT=n at a call: every tile
// below with and without turns and persistent blocks.
constexpr int kFull = 0, kBanded = 1, kFirstTimed = 2;

constexpr ForwardTile default_tile(int head_dim, bool banded) {
    // Three warpgroups: with rows so short, K and V are read from shared memory least often by many queries.
    if (head_dim == 64) return {192, 128, 2, true, banded};
    // FlashAttention-3 takes 192 x 144 and P through shared memory; in registers it does not fit beside S and O.
    if (head_dim == 96) return {128, 128, 2, true, banded};
    // Banded: a narrower tile wastes less on the diagonal. 176 keys are what fits in the shared memory.
    if (head_dim == 128) return {128, banded ? 128 : 176, 2, true, banded};
    if (head_dim == 192) return {128, 112, 2, false, banded};  // 193 KiB
    return {128, 80, 2, false, banded};                        // 225 KiB
}

struct TileSize {
    int queries, keys, stages;
};
constexpr int kTimedSizes = 2;
constexpr TileSize timed_size(int head_dim, int n) {
    if (head_dim == 64) return n == 0 ? TileSize{192, 128, 2} : TileSize{128, 192, 2};
    if (head_dim == 96) return n == 0 ? TileSize{128, 128, 2} : TileSize{128, 160, 2};
    if (head_dim == 128) return n == 0 ? TileSize{128, 176, 2} : TileSize{128, 128, 2};
    if (head_dim == 192) return n == 0 ? TileSize{128, 112, 2} : TileSize{128, 96, 2};
    return n == 0 ? TileSize{128, 80, 2} : TileSize{128, 64, 2};
}
#ifdef FASTATTN_SM90_VARIANTS
constexpr int kVariants = kFirstTimed + 4 * kTimedSizes;
#else
constexpr int kVariants = kFirstTimed;
#endif

constexpr ForwardTile forward_tile(int head_dim, int variant, bool ragged = false) {
    ForwardTile tile = default_tile(head_dim, variant == kBanded);
    if (variant >= kFirstTimed) {
        const int n = variant - kFirstTimed;
        const TileSize size = timed_size(head_dim, n / 4);
        tile = {size.queries, size.keys, size.stages, (n & 1) != 0, (n & 2) != 0};
    }
    // Never persistent where sequences differ in length: shares would be uneven, which blocks that wait for a
    // multiprocessor are not; and to look for the next sequence takes more registers than a thread that loads has.
    tile.persistent = tile.persistent && !ragged;
    return tile;
}

constexpr uint32_t forward_barriers(int stages) { return 2 + 4 * stages; }
constexpr uint32_t forward_shared_bytes(int head_dim, int variant) {
    const ForwardTile t = forward_tile(head_dim, variant);
    return 2 * (t.queries * head_dim + t.stages * t.keys * (head_dim + value_dim(head_dim))) +
           8 * forward_barriers(t.stages);
}

// The forward on e4m3. With collect, each product of weights and values comes by itself and is added to the others in
// registers, because tensor cores keep e4m3's sums to some 13 bits (cuda/ptx/wgmma.h); FlashAttention-3 as first
// published does not, and loses accuracy with long sequences. At head_dim 256 the registers have room for half a
// product then, and none for the next tile's S.
struct E4M3Tile {
    ForwardTile tile;
    bool collect;
};

constexpr E4M3Tile default_e4m3_tile(int head_dim, bool banded) {
    // K and V are half as large as in 16 bits, and used up in half the time: a third stage.
    if (head_dim <= 128) return {{128, 128, 3, true, banded}, true};
    return {{128, 128, 2, false, banded}, true};  // 192 KiB
}

struct E4M3TileSize {
    int queries, keys, stages;
    bool collect;
};
constexpr E4M3TileSize timed_e4m3_size(int head_dim, int n) {
    if (head_dim == 64) return n == 0 ? E4M3TileSize{128, 192, 3, true} : E4M3TileSize{192, 128, 3, false};
    if (head_dim == 128) return n == 0 ? E4M3TileSize{128, 128, 3, true} : E4M3TileSize{128, 192, 2, false};
    return n == 0 ? E4M3TileSize{128, 128, 2, true} : E4M3TileSize{128, 128, 2, false};
}
// The variants are numbered like those of the other forward.
constexpr E4M3Tile e4m3_tile(int head_dim, int variant) {
    if (variant < kFirstTimed) return default_e4m3_tile(head_dim, variant == kBanded);
    const int n = variant - kFirstTimed;
    const E4M3TileSize size = timed_e4m3_size(head_dim, n / 4);
    return {{size.queries, size.keys, size.stages, (n & 1) != 0, (n & 2) != 0}, size.collect};
}

// Q's place holds the output, which is twice as wide.
constexpr uint32_t e4m3_shared_bytes(int head_dim, int variant) {
    const ForwardTile t = e4m3_tile(head_dim, variant).tile;
    return 2 * t.queries * head_dim + 2 * t.stages * t.keys * head_dim + 8 * forward_barriers(t.stages);
}

// The backward: two warpgroups, with 64 keys each, or from head_dim 192 on (wide) with half of the columns of dK and dV
// of the same 64 keys.
struct KeyTile {
    int queries, keys;  // of one step, of the block
    int grad_stages;    // of dO
    bool wide;
    // K, V, two stages of Q, those of dO, two stages of dS (wide: and of P) and of each query's lse and delta, two
    // parts of 64 x 64 sums of dQ, seven barriers.
    constexpr int shared_bytes(int head_dim) const {
        const int key_dims = head_dim + value_dim(head_dim);
        const int query_dims = 2 * head_dim + grad_stages * value_dim(head_dim);
        return 2 * keys * key_dims + 2 * queries * query_dims + (wide ? 8 : 4) * keys * queries + 16 * queries +
               2 * 4 * 64 * 64 + 56;
    }
};
constexpr KeyTile key_tile(int head_dim) {
    // S^T, dP^T, dK and dV of 64 queries fill the registers at head_dim 128 (FlashAttention-3: 80 queries where nothing
    // is masked); at 64, with 128 queries, they do not fit.
    if (head_dim <= 128) return {64, 128, 2, false};
    if (head_dim == 192) return {64, 64, 2, true};  // 169 KiB
    // 225 KiB. One stage of dO, free once dV has it: the next is loaded beside the products of dQ, dK and S.
    return {64, 64, 1, true};
}

// dQ in one order of summation: two warpgroups with 64 queries each, whose S, dP and dQ are in registers.
struct QueryTile {
    int queries, keys, value_stages;  // two stages of K
    // Q, dO, the stages of K and V, at most nine barriers.
    constexpr int shared_bytes(int head_dim) const {
        return 2 * queries * (head_dim + value_dim(head_dim)) +
               2 * keys * (2 * head_dim + value_stages * value_dim(head_dim)) + 72;
    }
};
constexpr QueryTile query_tile(int head_dim) {
    if (head_dim == 64) return {128, 128, 2};  // 96 KiB
    if (head_dim == 128) return {128, 96, 2};  // 160 KiB
    if (head_dim == 192) return {128, 64, 2};  // 160 KiB
    return {128, 64, 1};                       // 224 KiB
}

// Decoding: 16 rows, the queries of a group of heads; four warps with 16 keys each. Stages are what lets two blocks
// share a multiprocessor, 96 KiB each (at 256 one block, 192 KiB); a multiprocessor needs some 40 KiB on their way to
// keep up its share of the memory's bandwidth, 25 to 36 bytes a nanosecond at a latency of a microsecond.
struct DecodeTile {
    int rows, keys;
};
constexpr DecodeTile kDecodeTile = {16, 64};
constexpr int decode_stages(int head_dim) { return head_dim == 64 ? 6 : 3; }
constexpr int decode_blocks(int head_dim) { return head_dim == 256 ? 1 : 2; }  // of a multiprocessor
constexpr int decode_shared_bytes(int head_dim) {
    return 2 * head_dim * (kDecodeTile.rows + 2 * decode_stages(head_dim) * kDecodeTile.keys) +
           3 * 8 * decode_stages(head_dim);
}

}  // namespace fastattn::cuda::sm90
