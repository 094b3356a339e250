// Forward with tensor cores for every call: masks, biases, dropout, any scale and strides, and few queries (decoding).
//
// The query heads of one key head are packed: a tile's rows are 64 of the (heads of the group) x (queries) rows, so that
// decoding reads keys and values once for all of them. With num_splits > 1 the keys are divided among as many blocks;
// each leaves its normalised output and lse in the workspace, and combine_kernel weighs them by exp(lse).
#include "cuda/launch.h"
#include "cuda/scheduler.h"
#include "cuda/sm80/entries.h"
#include "cuda/sm80/forward.h"
#include "cuda/sm80/kernels.h"

namespace fastattn::cuda::sm80 {
namespace {

constexpr int kCombineThreads = 128;

// The workspace of num_splits > 1: lse (num_splits, rows), then out (num_splits, rows, head_dim_v), both float, with
// rows = batch * heads_q * seqlen_q.
FASTATTN_DEVICE int64_t all_rows(const AttentionParams& p) { return p.batch * p.heads_q * p.seqlen_q; }
FASTATTN_DEVICE float* partial_lse(const AttentionParams& p, int64_t split) {
    return static_cast<float*>(p.workspace) + split * all_rows(p);
}
FASTATTN_DEVICE float* partial_out(const AttentionParams& p, int64_t split) {
    return static_cast<float*>(p.workspace) + (p.num_splits + split * p.head_dim_v) * all_rows(p);
}

// Row r of a group of heads: query i of head h.
struct PackedRow {
    int h, i;  // i = -1: no such row

    static FASTATTN_DEVICE PackedRow of(const AttentionParams& p, int hk, int row) {
        const int group = static_cast<int>(p.heads_q) / static_cast<int>(p.heads_k);
        const int queries = static_cast<int>(p.seqlen_q);
        return row < group * queries ? PackedRow{hk * group + row / queries, row % queries} : PackedRow{0, -1};
    }
};

// The packed rows from row0 on into the tile of Q, for any strides.
template <typename T, int kRows, int kHeadDim, int kThreads>
FASTATTN_DEVICE void load_packed(uint32_t to, const AttentionParams& p, int b, int hk, int row0) {
    using Layout = SwizzledTile<kHeadDim>;
#pragma unroll 1
    for (int n = thread_index(); n < kRows * Layout::kChunks; n += kThreads) {
        const int row = n / Layout::kChunks, chunk = n % Layout::kChunks;
        const PackedRow at = PackedRow::of(p, hk, row0 + row);
        Matrix<const T> q = head_matrix<const T>(p.q, b, at.h, 1, p.head_dim_qk);
        q.data += max32(at.i, 0) * q.row_stride;
        if (at.i < 0) q.cols = 0;
        const uint32_t address = to + Layout::offset(row, chunk);
        if (q.col_stride == 1 && reinterpret_cast<uintptr_t>(q.data) % 16 == 0 && q.cols % 8 == 0) {
            cp_async<16>(address, q.data + 8 * chunk, 8 * chunk < q.cols);
        } else {
#pragma unroll 1
            for (int pair = 0; pair < 4; ++pair) {
                const int col = 8 * chunk + 2 * pair;
                store_shared(address + 4 * pair, read_bits(q, 0, col) | read_bits(q, 0, col + 1) << 16);
            }
        }
    }
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL(general_forward_tile(kHeadDim).threads(), 1) forward_general_kernel(FASTATTN_CONSTANT AttentionParams p) {
    using Loop = ForwardLoop<T, kHeadDim, true>;
    constexpr ForwardTile kTile = Loop::kTile;
    static_assert(Loop::kM == 1);

    const int group_rows = static_cast<int>(p.heads_q) / static_cast<int>(p.heads_k) * static_cast<int>(p.seqlen_q);
    const int row_tiles = (group_rows + kTile.queries - 1) / kTile.queries;
    const int splits = static_cast<int>(p.num_splits), block = static_cast<int>(block_index()), split = block % splits;
    const WorkItem work = work_item(block / splits, row_tiles, p.batch * p.heads_k,
                                    p.seqlen_k * (p.head_dim_qk + p.head_dim_v) * 2);
    const int heads_k = static_cast<int>(p.heads_k), b = work.head / heads_k, hk = work.head % heads_k;
    const Band band = Band::of(p, b);
    const int row0 = (row_tiles - 1 - work.tile) * kTile.queries;

    // The tiles of keys that the queries of these rows see: of one head those between the first row and the last.
    const PackedRow first = PackedRow::of(p, hk, row0);
    const PackedRow last = PackedRow::of(p, hk, min32(row0 + kTile.queries, group_rows) - 1);
    const bool one_head = first.h == last.h;
    const TileRange tiles =
        p.prefix_lens.data
            ? Band::all_tiles(band.seqlen_k, kTile.keys)
            : band.key_tiles(one_head ? first.i : 0, one_head ? last.i : band.seqlen_q - 1, kTile.keys);
    const int per_split = (tiles.count() + splits - 1) / splits;
    const int begin = min32(split * per_split, tiles.count());
    const int end = min32(begin + per_split, tiles.count());

    const Matrix<const T> k = head_matrix<const T>(p.k, b, hk, band.seqlen_k, p.head_dim_qk);
    const Matrix<const T> v = head_matrix<const T>(p.v, b, hk, band.seqlen_k, p.head_dim_v);
    const bool k_chunks = in_chunks(k), v_chunks = in_chunks(v);
    const TileLoader<T, kTile.keys, kHeadDim, Loop::kThreads> copy_k(k), copy_v(v);
    const auto load_k = [&](uint32_t to, int j0) {
        if (k_chunks) return copy_k(to, j0);
        load_elements<T, kTile.keys, kHeadDim, Loop::kThreads>(to, k, j0);
    };
    const auto load_v = [&](uint32_t to, int j0) {
        if (v_chunks) return copy_v(to, j0);
        load_elements<T, kTile.keys, kHeadDim, Loop::kThreads>(to, v, j0);
    };

    // This lane's two rows.
    const PackedRow row[2] = {PackedRow::of(p, hk, row0 + Loop::first_row(0) + fragment_row(0)),
                              PackedRow::of(p, hk, row0 + Loop::first_row(0) + fragment_row(2))};
    // Scores are scaled before the softmax where it matters: something is added to them, or the maximum is a minimum.
    const float scale = static_cast<float>(p.softmax_scale);
    const bool scaled = p.bias.data || p.softcap != 0. || p.alibi_slopes.data || !(scale > 0.f);
    const bool every_entry = scaled || by_entry(p);
    const auto rules = [&](auto& s, int j0, int n) {
        if (n >= tiles.masked() && !every_entry) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const EntryRow entries = {b, row[half].h, row[half].i};
            const int key_begin = band.keys_begin(row[half].i);
            const int key_end = band.keys_end(row[half].i);
#pragma unroll
            for (int e = 0; e < 2 * Loop::kN; ++e) {
                float& score = s[0][e / 2][2 * half + e % 2];
                const int j = j0 + 8 * (e / 2) + fragment_col(e % 2);
                if (scaled) score *= scale;
                const bool in_window = key_begin <= j && j < key_end;
                score = row[half].i >= 0 && entries.sees(p, band, in_window, j) ? entries.score(p, band, score, j)
                                                                                : -INFINITY;
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
                    const uint32_t word = j & 2 ? random.word[2 + e] : random.word[e];
                    float& weight = s[0][n][2 * half + e];
                    if (word < p.dropout_threshold && float_bits(weight) != float_bits(kInvisible)) weight = 0.f;
                }
            }
        }
    };

    Loop loop(scaled ? kLog2E : scale * kLog2E);
    load_packed<T, kTile.queries, kHeadDim, Loop::kThreads>(smem_base(), p, b, hk, row0);
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
        const int64_t flat = (b * p.heads_q + at.h) * p.seqlen_q + at.i;
        float* lse = p.num_splits > 1 ? partial_lse(p, split) + flat
                                      : static_cast<float*>(p.lse.data) + b * p.lse.stride[0] +
                                            at.h * p.lse.stride[1] + at.i * p.lse.stride[2];
        if ((lane() & 3) == 0) store_global(lse, row_lse);
        const Matrix<T> out = head_matrix<T>(p.out, b, at.h, p.seqlen_q, p.head_dim_v);
#pragma unroll
        for (int e = 0; e < 2 * kHeadDim / 8; ++e) {
            const int col = 8 * (e / 2) + fragment_col(e % 2);
            const float value = loop.out[0][e / 2][2 * half + e % 2] * factor;
            if (col >= out.cols) continue;
            if (p.num_splits > 1) {
                store_global(partial_out(p, split) + flat * p.head_dim_v + col, value);
            } else {
                T element;
                from_float(value, element);
                store_global(&out.data[at.i * out.row_stride + col * out.col_stride], element);
            }
        }
    }
}

// One warp per row: lse = log sum exp(lse of the splits), out = sum exp(lse of a split - lse) times its output.
template <typename T>
FASTATTN_KERNEL(kCombineThreads, 1) combine_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int64_t flat = block_index() * (kCombineThreads / 32) + warp();
    if (flat >= all_rows(p)) return;
    const int64_t i = flat % p.seqlen_q, h = flat / p.seqlen_q % p.heads_q, b = flat / p.seqlen_q / p.heads_q;
    const float sink = p.sinks.data ? sink_of(p, h) : -INFINITY;
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
        store_global(static_cast<float*>(p.lse.data) + b * p.lse.stride[0] + h * p.lse.stride[1] + i * p.lse.stride[2],
                     sum == 0.f ? -INFINITY : pivot + log2_approx(sum) * OnlineSoftmax<1>::kLn2);
    }
    const Matrix<T> out = head_matrix<T>(p.out, b, h, p.seqlen_q, p.head_dim_v);
    for (int col = lane(); col < out.cols; col += 32) {
        float total = 0.f;
        for (int64_t split = 0; split < p.num_splits; ++split) {
            const float weight = exp2_approx((load_global(partial_lse(p, split) + flat) - pivot) * kLog2E);
            total += weight * load_global(partial_out(p, split) + flat * p.head_dim_v + col);
        }
        T element;
        from_float(total * factor, element);
        store_global(&out.data[i * out.row_stride + col * out.col_stride], element);
    }
}

}  // namespace

template <typename T, int kHeadDim>
void forward_general(const AttentionParams& p, void* stream) {
    constexpr ForwardTile kTile = general_forward_tile(kHeadDim);
    const int64_t group_rows = p.heads_q / p.heads_k * p.seqlen_q;
    const int64_t tiles = (group_rows + kTile.queries - 1) / kTile.queries;
    launch(forward_general_kernel<T, kHeadDim>, {tiles * p.heads_k * p.batch * p.num_splits}, kTile.threads(), kTile.shared_bytes(kHeadDim), stream, p);
    if (p.num_splits > 1) {
        const int64_t rows = p.batch * p.heads_q * p.seqlen_q;
        launch(combine_kernel<T>, {(rows + kCombineThreads / 32 - 1) / (kCombineThreads / 32)}, kCombineThreads, 0, stream, p);
    }
}

template void forward_general<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm80
