// Forward with tensor cores for every call: masks, biases, dropout, any scale and strides, pages, few queries
// (decoding).
//
// The query heads of one key head are packed: a tile's rows are 64 of the (heads of the group) x (queries) rows, so
// that decoding reads keys and values once for all of them. With num_splits > 1 the keys are divided among as many
// blocks; each leaves its normalised output and lse in the workspace, and combine_kernel weighs them by exp(lse).
#include "cuda/entries.h"
#include "cuda/launch.h"
#include "cuda/scheduler.h"
#include "cuda/sm80/forward.h"
#include "cuda/sm80/kernels.h"

namespace fastattn::cuda::sm80 {
namespace {

constexpr int kCombineThreads = 128;

// The workspace of num_splits > 1: lse (num_splits, rows), then out (num_splits, rows, head_dim_v), both float, with
// rows = all_rows(p).
FASTATTN_DEVICE float* partial_lse(const AttentionParams& p, int64_t split) {
    return static_cast<float*>(p.workspace) + split * all_rows(p);
}
FASTATTN_DEVICE float* partial_out(const AttentionParams& p, int64_t split) {
    return static_cast<float*>(p.workspace) + (p.num_splits + split * p.head_dim_v) * all_rows(p);
}

// Row r of a group of heads: query i of head h.
struct PackedRow {
    int h, i;  // i = -1: no such row

    static FASTATTN_DEVICE PackedRow of(const AttentionParams& p, const Band& band, int hk, int row) {
        const int group = static_cast<int>(p.heads_q) / static_cast<int>(p.heads_k);
        const int queries = static_cast<int>(p.seqlen_q), head = row / queries, i = row - head * queries;
        return head < group && i < band.seqlen_q ? PackedRow{hk * group + head, i} : PackedRow{0, -1};
    }
};

// The queries i0 .. i1 (inclusive, none where i0 > i1) that the rows from row0 on are about.
struct Queries {
    int i0, i1;

    static FASTATTN_DEVICE Queries of(const AttentionParams& p, const Band& band, int row0, int last_row) {
        const int queries = static_cast<int>(p.seqlen_q);
        if (row0 / queries != last_row / queries) return {0, band.seqlen_q - 1};
        return {row0 % queries, min32(last_row % queries, band.seqlen_q - 1)};
    }
};

// Key j of head hk of batch entry b, in its page.
template <typename T>
FASTATTN_DEVICE Matrix<const T> paged_row(const AttentionParams& p, const Tensor4& x, const Band& band, int b, int hk,
                                          int j, int64_t cols) {
    const int page_size = static_cast<int>(p.page_size);
    const bool exists = j < band.seqlen_k;
    const int64_t page = exists ? look_up(p.block_table, b, j / page_size) : 0;
    const int64_t at = page * x.stride[0] + hk * x.stride[1] + j % page_size * x.stride[2];
    return {static_cast<const T*>(x.data) + at, 0, x.stride[3], exists, static_cast<int>(cols)};
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL(general_forward_tile(kHeadDim).threads(), 1)
forward_general_kernel(FASTATTN_CONSTANT AttentionParams p) {
    using Loop = ForwardLoop<T, kHeadDim, true>;
    constexpr ForwardTile kTile = Loop::kTile;
    static_assert(Loop::kM == 1);

    const int group_rows = static_cast<int>(p.heads_q) / static_cast<int>(p.heads_k) * static_cast<int>(p.seqlen_q);
    const int row_tiles = (group_rows + kTile.queries - 1) / kTile.queries;
    const int splits = static_cast<int>(p.num_splits), block = static_cast<int>(block_index()), split = block % splits;
    const WorkItem work =
        work_item(block / splits, row_tiles, p.batch * p.heads_k, p.seqlen_k * (p.head_dim_qk + p.head_dim_v) * 2);
    const int heads_k = static_cast<int>(p.heads_k), b = work.head / heads_k, hk = work.head % heads_k;
    const Band band = Band::of(p, b);
    const int row0 = (row_tiles - 1 - work.tile) * kTile.queries;
    const Queries queries = Queries::of(p, band, row0, min32(row0 + kTile.queries, group_rows) - 1);
    if (queries.i0 > queries.i1) return;
    const TileRange tiles = p.prefix_lens.data ? Band::all_tiles(band.seqlen_k, kTile.keys)
                                               : band.key_tiles(queries.i0, queries.i1, kTile.keys);
    const int per_split = (tiles.count() + splits - 1) / splits;
    const int begin = min32(split * per_split, tiles.count());
    const int end = min32(begin + per_split, tiles.count());

    const auto load = [&](uint32_t to, const Tensor4& x, int64_t cols, int j0) {
        const Matrix<const T> keys = key_matrix<const T>(x, band, hk, cols);
        if (p.block_table.data) {
            const auto row = [&](int n) { return paged_row<T>(p, x, band, b, hk, j0 + n, cols); };
            load_rows<T, kTile.keys, kHeadDim, Loop::kThreads>(to, row);
        } else if (in_chunks(keys)) {
            TileLoader<T, kTile.keys, kHeadDim, Loop::kThreads>{keys, opaque(thread_index())}(to, j0);
        } else {
            load_elements<T, kTile.keys, kHeadDim, Loop::kThreads>(to, keys, j0);
        }
    };
    const auto load_k = [&](uint32_t to, int j0) { load(to, p.k, p.head_dim_qk, j0); };
    const auto load_v = [&](uint32_t to, int j0) { load(to, p.v, p.head_dim_v, j0); };

    // This lane's two rows.
    const PackedRow row[2] = {PackedRow::of(p, band, hk, row0 + Loop::first_row(0) + fragment_row(0)),
                              PackedRow::of(p, band, hk, row0 + Loop::first_row(0) + fragment_row(2))};
    // Scores are scaled before the softmax where it matters: something is added to them, or the maximum is a minimum.
    const float scale = static_cast<float>(p.softmax_scale);
    const bool scaled = p.bias.data || p.softcap != 0. || p.alibi_slopes.data || !(scale > 0.f);
    const bool every_entry = scaled || by_entry(p);
    const EntryRules entries(p, band, b);
    const auto rules = [&](auto& s, int j0, int n) {
        if (n >= tiles.masked() && !every_entry) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const EntryRules::Row at = entries.row(row[half].h, opaque(row[half].i));
#pragma unroll
            for (int e = 0; e < 2 * Loop::kN; ++e) {
                float &score = s[0][e / 2][2 * half + e % 2], slope;
                const int j = j0 + 8 * (e / 2) + fragment_col(e % 2);
                score = entries.capped(scaled ? score * scale : score, slope);
                score = entries.sees(at, j) ? entries.biased(at, score, j) : -INFINITY;
            }
        }
    };
    const auto drop = [&](auto& s, int j0) {
        if (p.dropout_threshold == 0) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int n = 0; n < Loop::kN; ++n) {
                const int j = j0 + 8 * n + fragment_col(0);
                const Philox4 random = dropout_words(p, b, row[half].h, row[half].i, j);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& weight = s[0][n][2 * half + e];
                    if (drops(p, random, j + e) && float_bits(weight) != float_bits(kInvisible)) weight = 0.f;
                }
            }
        }
    };

    Loop loop(scaled ? kLog2E : scale * kLog2E);
    load_rows<T, kTile.queries, kHeadDim, Loop::kThreads>(smem_base(), [&](int n) {
        const PackedRow at = PackedRow::of(p, band, hk, row0 + n);
        Matrix<const T> q = query_matrix<const T>(p.q, band, at.h, p.head_dim_qk);
        q.data += max32(at.i, 0) * q.row_stride;
        q.rows = at.i >= 0;
        return q;
    });
    const uint32_t rows = (row[0].i >= 0 ? 1u : 0u) | (row[1].i >= 0 ? 2u : 0u);
    for (bool careful = false;; careful = true) {
        loop.run(tiles, begin, end, end, careful, load_k, load_v, rules, drop);
        if (careful || !barrier_or(any_nonfinite(loop.out, rows))) break;
    }

    loop.softmax.finish();
    const float kept = p.dropout_threshold ? static_cast<float>(p.dropout_scale) : 1.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const PackedRow at = row[half];
        if (at.i < 0) continue;
        float factor = loop.softmax.normalizer(0, half) * kept, row_lse = loop.softmax.lse(0, half);
        if (p.sinks.data && p.num_splits == 1) factor *= add_sink(row_lse, sink_of(p, at.h));
        const int64_t flat = band.row_index(p, at.h, at.i);
        float* lse = p.num_splits > 1 ? partial_lse(p, split) + flat : band.row_of(p.lse, at.h, at.i);
        if ((lane() & 3) == 0) store_global(lse, row_lse);
        const Matrix<T> out = query_matrix<T>(p.out, band, at.h, p.head_dim_v);
        T* out_row = out.data + at.i * out.row_stride;
        float* partial = partial_out(p, split) + flat * out.cols;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            const int col = 8 * n + fragment_col(0);
            const float low = loop.out[0][n][2 * half] * factor, high = loop.out[0][n][2 * half + 1] * factor;
            if (p.num_splits == 1) {
                store_pair(out_row, out.col_stride, out.cols, col, low, high);
            } else {
                if (col < out.cols) store_global(partial + col, low);
                if (col + 1 < out.cols) store_global(partial + col + 1, high);
            }
        }
    }
}

// One warp per row: lse = log sum exp(lse of the splits), out = sum exp(lse of a split - lse) times its output.
template <typename T>
FASTATTN_KERNEL(kCombineThreads, 1)
combine_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int64_t flat = block_index() * (kCombineThreads / 32) + warp();
    if (flat >= all_rows(p)) return;
    const TableRow row = TableRow::of(p, flat);
    const float sink = p.sinks.data ? sink_of(p, row.h) : -INFINITY;
    float max = sink, sum = 0.f;
    for (int64_t split = 0; split < p.num_splits; ++split) {
        max = fmaxf(max, load_global(partial_lse(p, split) + flat));
    }
    const float pivot = max == -INFINITY ? 0.f : max;
    sum += exp2_approx((sink - pivot) * kLog2E);
    for (int64_t split = 0; split < p.num_splits; ++split) {
        sum += exp2_approx((load_global(partial_lse(p, split) + flat) - pivot) * kLog2E);
    }
    const float factor = sum == 0.f ? 0.f : 1.f / sum;
    if (lane() == 0) {
        store_global(static_cast<float*>(p.lse.data) + row.offset(p.lse),
                     sum == 0.f ? -INFINITY : pivot + log2_approx(sum) * OnlineSoftmax<1>::kLn2);
    }
    const Matrix<T> out = row_matrix<T>(p.out, row, p.head_dim_v);
    for (int col = lane(); col < out.cols; col += 32) {
        float total = 0.f;
        for (int64_t split = 0; split < p.num_splits; ++split) {
            const float weight = exp2_approx((load_global(partial_lse(p, split) + flat) - pivot) * kLog2E);
            total += weight * load_global(partial_out(p, split) + flat * p.head_dim_v + col);
        }
        T element;
        from_float(total * factor, element);
        store_global(&out.data[col * out.col_stride], element);
    }
}

}  // namespace

template <typename T, int kHeadDim>
void forward_general(const AttentionParams& p, void* stream) {
    constexpr ForwardTile kTile = general_forward_tile(kHeadDim);
    const int64_t group_rows = p.heads_q / p.heads_k * p.seqlen_q;
    const int64_t tiles = (group_rows + kTile.queries - 1) / kTile.queries;
    launch(forward_general_kernel<T, kHeadDim>, {tiles * p.heads_k * p.batch * p.num_splits}, kTile.threads(),
           kTile.shared_bytes(kHeadDim), stream, p);
    if (p.num_splits > 1) {
        const int64_t rows = all_rows(p);
        launch(combine_kernel<T>, {(rows + kCombineThreads / 32 - 1) / (kCombineThreads / 32)}, kCombineThreads, 0,
               stream, p);
    }
}

template void forward_general<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm80
