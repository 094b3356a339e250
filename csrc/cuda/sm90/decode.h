// Forward for at most 16 rows, the queries of the heads that share a head of keys: decoding. Its time is that of
// reading K and V once, so all of the machine reads: the keys are split among blocks, and TMA keeps a ring of tiles on
// its way.
//
// One warp copies; each of four takes 16 of a tile's 64 keys and has its own online softmax and output, so that within
// the loop they wait for data only. mma.m16n8k16 holds the 16 rows; wgmma's 64 would be empty for the most part. At the
// end outputs are weighed with exp(lse): those of the warps here, those of the splits by combine_kernel.
#pragma once

#include "cuda/band.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/mma.h"
#include "cuda/sm90/contain.h"
#include "cuda/sm90/softmax.h"
#include "cuda/sm90/tiles.h"

namespace fastattn::cuda::sm90 {

struct DecodeArguments {
    TensorMap k, v;  // boxes: one span of all rows of a tile
    AttentionParams params;
};

// Paged: keys of one copy, which lie in one page and where the swizzle of a tile begins anew.
FASTATTN_HOST_DEVICE int rows_of_box(const AttentionParams& p) {
    const int page = static_cast<int>(p.page_size);
    return page % 64 == 0 ? 64 : page % 32 == 0 ? 32 : page % 16 == 0 ? 16 : 8;
}

// The workspace of num_splits > 1: out (num_splits, rows, head_dim_v), then lse (num_splits, rows), both float, with
// rows = all_rows(p).
FASTATTN_DEVICE float* partial_out(const AttentionParams& p, int64_t split, int64_t row) {
    return static_cast<float*>(p.workspace) + (split * all_rows(p) + row) * p.head_dim_v;
}
FASTATTN_DEVICE float* partial_lse(const AttentionParams& p, int64_t split, int64_t row) {
    return static_cast<float*>(p.workspace) + (p.num_splits * p.head_dim_v + split) * all_rows(p) + row;
}

FASTATTN_DEVICE void write_lse(const AttentionParams& p, const TableRow& row, float lse) {
    store_global(static_cast<float*>(p.lse.data) + row.offset(p.lse), lse);
}

// Columns col and col + 1 (col even) of a row of the output.
template <typename T>
FASTATTN_DEVICE void write_pair(const AttentionParams& p, const TableRow& row, int col, float x, float y) {
    T* to = static_cast<T*>(p.out.data) + row.offset(p.out) + col;
    store_global(reinterpret_cast<uint32_t*>(to), pack<T>(x, y));
}

// kPaged: keys and values in pages, of which a box of the maps is a part.
template <typename T, int kHeadDim, bool kPaged>
struct Decode {
    static constexpr int kKeys = kDecodeTile.keys, kRows = kDecodeTile.rows, kWarps = kKeys / 16;
    static constexpr int kThreads = 32 * (kWarps + 1), kStages = decode_stages(kHeadDim);
    using Tile = Operand<kKeys, kHeadDim>;  // of K and of V
    using Queries = Operand<kRows, kHeadDim>;
    static constexpr int kSteps = kHeadDim / 16, kBlocks = kHeadDim / 8;
    static_assert(kRows == 16 && kWarps == 4);

    const DecodeArguments& arguments;
    const AttentionParams& p = arguments.params;
    const int group = static_cast<int>(p.heads_q / p.heads_k);
    const uint32_t k = smem_base(), v = k + kStages * Tile::kBytes, q = v + kStages * Tile::kBytes;
    const uint32_t barriers = q + Queries::kBytes;
    int split, b, hk;
    Band band;
    int queries;
    TileRange tiles;
    int begin, end;  // of tiles.at()

    FASTATTN_DEVICE explicit Decode(const DecodeArguments& arguments) : arguments(arguments) {
        const int splits = static_cast<int>(p.num_splits), heads_k = static_cast<int>(p.heads_k);
        const int block = static_cast<int>(block_index());
        split = block % splits, hk = block / splits % heads_k, b = block / splits / heads_k;
        band = Band::of(p, b);
        queries = band.seqlen_q;
        tiles = band.key_tiles(0, queries - 1, kKeys);
        const int per_split = (tiles.count() + splits - 1) / splits;
        begin = min32(split * per_split, tiles.count());
        end = min32(begin + per_split, tiles.count());
    }

    FASTATTN_DEVICE uint32_t k_full(int stage) const { return barriers + 8 * stage; }
    FASTATTN_DEVICE uint32_t v_full(int stage) const { return k_full(stage) + 8 * kStages; }
    FASTATTN_DEVICE uint32_t empty(int stage) const { return k_full(stage) + 16 * kStages; }

    FASTATTN_DEVICE void initialize() const {
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(empty(stage), kWarps);
        }
        fence_mbarrier_init();
    }

    // One thread, where kPaged one warp: all loads.
    FASTATTN_DEVICE void produce() const {
        RingPlace<kStages> place;
        for (int n = begin; n < end; ++n, place.advance()) {
            const Rows rows = rows_from(tiles.at(n) * kKeys);
            const uint32_t to = place.stage * Tile::kBytes + lane_index() * rows.count * Tile::kRowBytes;
            mbarrier_wait(empty(place.stage), place.parity ^ 1);
            if (lane_index() == 0) mbarrier_arrive_expect_tx(k_full(place.stage), Tile::kBytes);
            if (lane_index() == 0) mbarrier_arrive_expect_tx(v_full(place.stage), Tile::kBytes);
            if (kPaged) warp_barrier();
            if (lane_index() * rows.count >= kKeys) continue;
            Tile::load(k + to, arguments.k, k_full(place.stage), rows.first, hk, rows.batch);
            Tile::load(v + to, arguments.v, v_full(place.stage), rows.first, hk, rows.batch);
        }
    }

    FASTATTN_DEVICE void consume() const {
        RowSoftmax softmax(static_cast<float>(p.softmax_scale) * kLog2E);
        float out[kBlocks][4] = {};
        load_queries();
        RingPlace<kStages> place;
        int n = begin;
        for (; n < min32(end, tiles.masked()); ++n) step<true>(n, softmax, out, place);
        for (; n < end; ++n) step<false>(n, softmax, out, place);
        softmax.finish();
        merge(softmax, out);
    }

private:
    // Those of a tile that a lane copies: `count` from `first` on, where the lane has any.
    struct Rows {
        int count, first, batch;
    };
    FASTATTN_DEVICE Rows rows_from(int j0) const {
        if (!kPaged) return {kKeys, band.first_k + j0, band.batch};
        const int count = rows_of_box(p), j = j0 + lane_index() * count;
        // Of a page that no key is in, the table may say anything: rows past the end of a page come as 0.
        if (j >= band.seqlen_k) return {count, static_cast<int>(p.page_size), 0};
        return {count, j % static_cast<int>(p.page_size), page_of(j)};
    }
    FASTATTN_DEVICE int page_of(int j) const { return look_up(p.block_table, b, j / static_cast<int>(p.page_size)); }

    static FASTATTN_DEVICE int warp() { return thread_index() / 32; }
    // Lane / 4 + 8 half: this lane's rows of the fragments.
    static FASTATTN_DEVICE int row(int half) { return lane_index() / 4 + 8 * half; }
    FASTATTN_DEVICE bool exists(int row) const { return row < group * queries; }
    FASTATTN_DEVICE int head_of(int row) const { return hk * group + row / queries; }
    FASTATTN_DEVICE int query_of(int row) const { return row % queries; }

    FASTATTN_DEVICE void wait_for_warps() const { named_barrier_sync(1, 32 * kWarps); }

    // The rows of Q; those that do not exist and columns past head_dim_qk are 0.
    FASTATTN_DEVICE void load_queries() const {
#pragma unroll 1
        for (int n = thread_index(); n < kRows * kBlocks; n += 32 * kWarps) {
            const int row = n / kBlocks, chunk = n % kBlocks;
            Words4 eight = {};
            if (exists(row) && 8 * chunk < p.head_dim_qk) {
                const T* from = query_row<T>(p.q, band, head_of(row), query_of(row)) + 8 * chunk;
                eight = load_global(reinterpret_cast<const Words4*>(from));
            }
            store_shared(Queries::address(q, row, chunk), eight);
        }
        wait_for_warps();
    }

    template <bool kMasked>
    FASTATTN_DEVICE void step(int n, RowSoftmax& softmax, float (&out)[kBlocks][4], RingPlace<kStages>& place) const {
        const int j0 = (kMasked ? tiles.at(n) : tiles.full(n)) * kKeys + 16 * warp();
        const uint32_t k_tile = k + place.stage * Tile::kBytes, v_tile = v + place.stage * Tile::kBytes;
        float s[2][4] = {}, weights[8], shrink[2];
        uint32_t operand[4];

        mbarrier_wait(k_full(place.stage), place.parity);
        const int key = 16 * warp() + (lane_index() & 7) + (lane_index() >> 4 << 3), chunk = lane_index() >> 3 & 1;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t keys[4];
            ldmatrix_x4(operand, Queries::address(q, lane_index() & 15, 2 * step + (lane_index() >> 4)));
            ldmatrix_x4(keys, Tile::address(k_tile, key, 2 * step + chunk));
            mma_m16n8k16<T>(s[0], operand, keys[0], keys[1]);
            mma_m16n8k16<T>(s[1], operand, keys[2], keys[3]);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = query_of(row(e / 2 % 2)), j = j0 + e / 4 * 8 + 2 * (lane_index() % 4) + e % 2;
            const bool visible = !kMasked || (band.keys_begin(i) <= j && j < band.keys_end(i));
            weights[e] = visible ? s[e / 4][e % 4] : -INFINITY;
        }
        softmax.weigh<kMasked>(weights, shrink);
        pack_operand<T>(operand, weights, 0);
#pragma unroll
        for (int e = 0; e < 4 * kBlocks; ++e) out[e / 4][e % 4] *= shrink[e / 2 % 2];

        mbarrier_wait(v_full(place.stage), place.parity);
        if (kMasked) clear_unseen(v_tile, j0);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            uint32_t columns[4];
            ldmatrix_x4_trans(columns,
                              Tile::address(v_tile, 16 * warp() + (lane_index() & 15), 2 * step + (lane_index() >> 4)));
            mma_m16n8k16<T>(out[2 * step], operand, columns[0], columns[1]);
            mma_m16n8k16<T>(out[2 * step + 1], operand, columns[2], columns[3]);
        }
        warp_barrier();
        if (lane_index() == 0) mbarrier_arrive(empty(place.stage));
        place.advance();
    }

    // Values that no query sees may be NaN, as those of a cache behind its last key: 0 times them is to be 0.
    FASTATTN_DEVICE void clear_unseen(uint32_t v_tile, int j0) const {
        const int first = band.keys_begin(0), last = band.keys_end(queries - 1);
#pragma unroll 1
        for (int r = 0; r < 16; ++r) {
            if (first <= j0 + r && j0 + r < last) continue;
#pragma unroll 1
            for (int chunk = lane_index(); chunk < kHeadDim / 8; chunk += 32) {
                store_shared(Tile::address(v_tile, 16 * warp() + r, chunk), Float4{});
            }
        }
        fence_proxy_async();  // before the ring's next copy to the same place
        warp_barrier();
    }

    // In the place of the ring: [warp][row][kPitch] outputs, then [warp][row] maxima, then sums. A pitch of 8 mod 32
    // floats lets the eight rows of a fragment write to different banks.
    static constexpr int kPitch = kHeadDim + 8;
    FASTATTN_DEVICE uint32_t out_address(int warp, int row, int col) const {
        return smem_base() + 4 * ((warp * kRows + row) * kPitch + col);
    }
    FASTATTN_DEVICE uint32_t max_address(int warp, int row) const {
        return out_address(kWarps, 0, 0) + 4 * (warp * kRows + row);
    }
    FASTATTN_DEVICE uint32_t sum_address(int warp, int row) const {
        return max_address(warp, row) + 4 * kWarps * kRows;
    }
    static_assert(4 * kWarps * kRows * (kPitch + 2) <= 2 * kStages * Tile::kBytes);

    FASTATTN_DEVICE void merge(const RowSoftmax& softmax, const float (&out)[kBlocks][4]) const {
        wait_for_warps();  // nobody reads the ring any more
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
                store_shared(out_address(warp(), row(half), 8 * n + 2 * (lane_index() % 4)),
                             Float2{out[n][2 * half], out[n][2 * half + 1]});
            }
            if (lane_index() % 4 == 0) {
                store_shared(max_address(warp(), row(half)), softmax.max[half]);
                store_shared(sum_address(warp(), row(half)), softmax.sum[half]);
            }
        }
        wait_for_warps();
#pragma unroll 1
        for (int r = warp(); r < kRows && exists(r); r += kWarps) merge_row(r, softmax.unit);
    }

    // One warp.
    FASTATTN_DEVICE void merge_row(int row, float unit) const {
        const int h = head_of(row), i = query_of(row);
        float max = -INFINITY, sum = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) max = fmaxf(max, load_shared<float>(max_address(w, row)));
        const float pivot = max == -INFINITY ? 0.f : max;
        RowSum<kHeadDim> total;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float weight = exp2_approx((load_shared<float>(max_address(w, row)) - pivot) * unit);
            sum = fmaf(weight, load_shared<float>(sum_address(w, row)), sum);
#pragma unroll
            for (int n = 0; n < total.kPairs; ++n) {
                const Float2 part = load_shared<Float2>(out_address(w, row, total.column(n)));
                total.sum[n][0] = fmaf(weight, part.x, total.sum[n][0]);
                total.sum[n][1] = fmaf(weight, part.y, total.sum[n][1]);
            }
        }
        float check = 0.f;  // 0 * x is 0 for every finite x, NaN for all others
#pragma unroll
        for (int n = 0; n < total.kPairs; ++n) {
            check = fmaf(0.f, total.sum[n][0], fmaf(0.f, total.sum[n][1], check));
        }
        if (any_lane(check != 0.f)) redo(row, unit, pivot, total);

        const float factor = sum == 0.f ? 0.f : 1.f / sum;
        const float lse = sum == 0.f ? -INFINITY : fmaf(max, unit * kLn2, log2_approx(sum) * kLn2);
        const int64_t flat = band.row_index(p, h, i);
        const TableRow at = {band.batch, h, band.first_q + i};
        if (lane_index() == 0) {
            p.num_splits > 1 ? store_global(partial_lse(p, split, flat), lse) : write_lse(p, at, lse);
        }
#pragma unroll
        for (int n = 0; n < total.kPairs; ++n) {
            const int col = total.column(n);
            if (col >= p.head_dim_v) continue;
            const Float2 pair = {total.sum[n][0] * factor, total.sum[n][1] * factor};
            if (p.num_splits > 1) {
                store_global(reinterpret_cast<Words2*>(partial_out(p, split, flat) + col), bit_cast<Words2>(pair));
            } else {
                write_pair<T>(p, at, col, pair.x, pair.y);
            }
        }
    }

    FASTATTN_DEVICE const T* key_at(const Tensor4& x, int j) const {
        if (!kPaged) return key_row<T>(x, band, hk, j);
        const int64_t at = page_of(j) * x.stride[0] + hk * x.stride[1] + j % p.page_size * x.stride[2];
        return static_cast<const T*>(x.data) + at;
    }

    // The row's sum over this block's keys without tensor cores: NaN of keys that other queries see does not reach it.
    FASTATTN_DEVICE void redo(int row, float unit, float pivot, RowSum<kHeadDim>& total) const {
        total = {};
#pragma unroll 1
        for (int n = begin; n < end; ++n) {
            const int j0 = tiles.at(n) * kKeys;
            redo_keys<T>(p, band, head_of(row), query_of(row), j0, j0 + kKeys, unit, pivot, 1.f, total,
                         [&](const Tensor4& x, int j) { return key_at(x, j); });
        }
    }
};

// A block for each row: lse = log sum exp(lse of the splits), out = sum exp(lse of a split - lse) times its output.
// Warps take splits in turn, lanes the columns.
template <typename T, int kHeadDim>
struct Combine {
    static constexpr int kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kSharedBytes = 4 * kWarps * (kHeadDim + 1);

    static FASTATTN_DEVICE void run(const AttentionParams& p) {
        const int64_t row = block_index();
        const TableRow at = TableRow::of(p, row);
        const int warp = thread_index() / 32;
        const int splits = static_cast<int>(p.num_splits);
        float max = -INFINITY;
#pragma unroll 1
        for (int split = lane_index(); split < splits; split += 32) {
            max = fmaxf(max, load_global(partial_lse(p, split, row)));
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) max = fmaxf(max, shuffle_xor(max, mask));
        const float pivot = max == -INFINITY ? 0.f : max;

        RowSum<kHeadDim> total;
        float sum = 0.f;
#pragma unroll 4
        for (int split = warp; split < splits; split += kWarps) {
            const float weight = exp2_approx((load_global(partial_lse(p, split, row)) - pivot) * kLog2E);
            const float* part = partial_out(p, split, row);
            sum += weight;
#pragma unroll
            for (int n = 0; n < total.kPairs; ++n) {
                const int col = total.column(n);
                if (col >= p.head_dim_v) continue;
                const Float2 pair = bit_cast<Float2>(load_global(reinterpret_cast<const Words2*>(part + col)));
                total.sum[n][0] = fmaf(weight, pair.x, total.sum[n][0]);
                total.sum[n][1] = fmaf(weight, pair.y, total.sum[n][1]);
            }
        }
        const auto shared = [](int warp, int at) { return smem_base() + 4 * (at * kWarps + warp); };
        if (lane_index() == 0) store_shared(shared(warp, kHeadDim), sum);
#pragma unroll
        for (int n = 0; n < total.kPairs; ++n) {
            store_shared(shared(warp, total.column(n)), total.sum[n][0]);
            store_shared(shared(warp, total.column(n) + 1), total.sum[n][1]);
        }
        barrier();
        if (warp > 0) return;
        const auto over_warps = [&](int at) {
            const Float4 x = load_shared<Float4>(shared(0, at));
            return x.x + x.y + (x.z + x.w);
        };
        sum = over_warps(kHeadDim);
        const float factor = sum == 0.f ? 0.f : 1.f / sum;
        if (lane_index() == 0) write_lse(p, at, sum == 0.f ? -INFINITY : pivot + log2_approx(sum) * kLn2);
#pragma unroll
        for (int n = 0; n < total.kPairs; ++n) {
            const int col = total.column(n);
            if (col < p.head_dim_v) {
                write_pair<T>(p, at, col, over_warps(col) * factor, over_warps(col + 1) * factor);
            }
        }
    }
};

}  // namespace fastattn::cuda::sm90
