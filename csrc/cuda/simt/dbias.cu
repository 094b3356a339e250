// The gradient of the bias: one block per 64 x 64 entries of it; the sum of dS over what was broadcast, in one order.
#include "cuda/launch.h"
#include "cuda/simt/gradient.h"
#include "cuda/simt/kernels.h"

namespace fastattn::cuda::simt {
namespace {

struct Range {
    int begin, end;
};

// The blocks of dbias_kernel along one dimension: tiles of it, or one block that sums over all of it.
FASTATTN_DEVICE Range summed(int64_t bias_size, int64_t size, int64_t index, int64_t step) {
    const int64_t begin = bias_size == 1 ? 0 : index * step, end = bias_size == 1 ? size : begin + step;
    return {static_cast<int>(begin), static_cast<int>(end < size ? end : size)};
}

template <typename T>
FASTATTN_KERNEL(kThreads, 1)
dbias_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int64_t tiles_i = (p.bias_shape[2] + kBlock - 1) / kBlock, tiles_j = (p.bias_shape[3] + kBlock - 1) / kBlock;
    const int64_t tile_j = block_index() % tiles_j, tile_i = block_index() / tiles_j % tiles_i;
    const int64_t head = block_index() / tiles_j / tiles_i % p.bias_shape[1];
    const int64_t batch = block_index() / tiles_j / tiles_i / p.bias_shape[1];
    const Range batches = summed(p.bias_shape[0], p.batch, batch, 1);
    const Range heads = summed(p.bias_shape[1], p.heads_q, head, 1);
    const Range queries = summed(p.bias_shape[2], p.seqlen_q, tile_i, kBlock);
    const Range keys = summed(p.bias_shape[3], p.seqlen_k, tile_j, kBlock);

    Accumulator total[1];
    clear(total);
    for (int bh = 0; bh < (batches.end - batches.begin) * (heads.end - heads.begin); ++bh) {
        const int b = batches.begin + bh / (heads.end - heads.begin);
        const int h = heads.begin + bh % (heads.end - heads.begin);
        const Band band = Band::of(p, b);
        const EntryRules rules(p, band, b);
        for (int i0 = queries.begin; i0 < min32(queries.end, band.seqlen_q); i0 += kBlock) {
            const TileRange seen = key_tiles(p, band, i0);
            const int end = min32(seen.last * kBlock, keys.end);
            for (int j0 = max32(seen.first * kBlock, keys.begin); j0 < end; j0 += kBlock) {
                Recomputed tile;
                if (!recompute<T, true>(tile, rules, h, i0, j0)) continue;
#pragma unroll
                for (int e = 0; e < 16; ++e) total[0][e / 4][e % 4] += tile.ds[e / 4][e % 4];
            }
        }
    }

    // The tile's own rows and columns are summed where the bias has size 1 there, by one thread for each result.
    store_exchange<false>(total[0]);
    barrier();
    const int rows = min32(kBlock, static_cast<int>(p.bias_shape[2] - tile_i * kBlock));
    const int cols = min32(kBlock, static_cast<int>(p.bias_shape[3] - tile_j * kBlock));
    const int sum_rows = p.bias_shape[2] == 1 ? kBlock : 1, sum_cols = p.bias_shape[3] == 1 ? kBlock : 1;
    for (int e = thread_index(); e < rows * cols; e += kThreads) {
        const int row = e / cols, col = e % cols;
        float sum = 0.f;
        for (int r = row; r < row + sum_rows; ++r) {
            for (int c = col; c < col + sum_cols; ++c) sum += load_shared<float>(at(smem_base() + kExchange, r, c));
        }
        write_dbias(p,
                    batch * p.dbias.stride[0] + head * p.dbias.stride[1] + (tile_i * kBlock + row) * p.dbias.stride[2] +
                        (tile_j * kBlock + col) * p.dbias.stride[3],
                    sum);
    }
}

}  // namespace

template <typename T>
void dbias(const AttentionParams& p, void* stream) {
    const auto tiles = [](int64_t size) { return (size + kBlock - 1) / kBlock; };
    launch(dbias_kernel<T>, {p.bias_shape[0] * p.bias_shape[1] * tiles(p.bias_shape[2]) * tiles(p.bias_shape[3])},
           kThreads, kSharedBytes, stream, p);
}

template void dbias<FASTATTN_DTYPE>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::simt
