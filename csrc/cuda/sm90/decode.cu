// Decoding on Hopper for one element type and head dimension.
#include "cuda/sm90/decode.h"

#include "cuda/launch.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/maps.h"

namespace fastattn::cuda::sm90 {
namespace {

template <typename T, int kHeadDim, bool kPaged>
FASTATTN_KERNEL((Decode<T, kHeadDim, kPaged>::kThreads), 1)
decode_kernel(FASTATTN_CONSTANT DecodeArguments arguments) {
    using Block = Decode<T, kHeadDim, kPaged>;
    const Block block(arguments);
    if (block.queries == 0) return;
    if (thread_index() == 0) {
        prefetch_tensor_map(&arguments.k);
        prefetch_tensor_map(&arguments.v);
        block.initialize();
    }
    barrier();
    if (thread_index() >= 32 * Block::kWarps) {
        if (kPaged || lane_index() == 0) block.produce();
    } else {
        block.consume();
    }
}

template <typename T, int kHeadDim>
FASTATTN_KERNEL((Combine<T, kHeadDim>::kThreads), 1)
combine_kernel(FASTATTN_CONSTANT AttentionParams p) {
    Combine<T, kHeadDim>::run(p);
}

}  // namespace

template <typename T, int kHeadDim>
void decode(const AttentionParams& p, void* stream) {
    using Block = Decode<T, kHeadDim, false>;  // sizes are the same with kPaged
    using Tile = typename Block::Tile;
    const bool paged = p.page_size != 0;
    const int rows = paged ? rows_of_box(p) : Block::kKeys;
    const DecodeArguments arguments{
        key_map<Tile>(p, p.k, p.head_dim_qk, rows),
        key_map<Tile>(p, p.v, p.head_dim_v, rows),
        p,
    };
    launch(paged ? decode_kernel<T, kHeadDim, true> : decode_kernel<T, kHeadDim, false>,
           {p.num_splits * p.heads_k * p.batch}, Block::kThreads, decode_shared_bytes(kHeadDim), stream, arguments);
    if (p.num_splits > 1) {
        using Rows = Combine<T, kHeadDim>;
        launch(combine_kernel<T, kHeadDim>, {all_rows(p)}, Rows::kThreads, Rows::kSharedBytes, stream, p);
    }
}

template void decode<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm90
