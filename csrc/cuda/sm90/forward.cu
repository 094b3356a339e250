// The Hopper forward for one element type and head dimension.
#include "cuda/sm90/forward.h"

#include <utility>

#include "cuda/launch.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/maps.h"

namespace fastattn::cuda::sm90 {
namespace {

template <typename T, int kHeadDim, int kVariant>
FASTATTN_KERNEL(forward_tile(kHeadDim, kVariant).threads(), 1)
forward_kernel(FASTATTN_CONSTANT ForwardArguments arguments) {
    using Block = Forward<T, kHeadDim, kVariant>;
    const Block block(arguments);
    if (thread_index() == 0) {
        prefetch_tensor_map(&arguments.q);
        prefetch_tensor_map(&arguments.k);
        prefetch_tensor_map(&arguments.v);
        prefetch_tensor_map(&arguments.out);
        block.initialize();
    }
    barrier();
    if (thread_index() < 128) {
        setmaxnreg_decrease<Block::kProducerRegisters>();
        if (thread_index() == 0) block.produce();
    } else {
        setmaxnreg_increase<Block::kConsumerRegisters>();
        block.consume();
    }
}

template <typename T, int kHeadDim, int kVariant>
void launch_variant(const AttentionParams& p, int multiprocessors, void* stream) {
    using Kernel = Forward<T, kHeadDim, kVariant>;
    constexpr ForwardTile kTile = Kernel::kTile;
    const ForwardArguments arguments{
        tensor_map<typename Kernel::Queries>(p.dtype, p.q, p.batch, p.heads_q, p.seqlen_q, p.head_dim_qk,
                                             kTile.queries),
        tensor_map<typename Kernel::Keys>(p.dtype, p.k, p.batch, p.heads_k, p.seqlen_k, p.head_dim_qk, kTile.keys),
        tensor_map<typename Kernel::Values>(p.dtype, p.v, p.batch, p.heads_k, p.seqlen_k, p.head_dim_v, kTile.keys),
        tensor_map<typename Kernel::Outputs>(p.dtype, p.out, p.batch, p.heads_q, p.seqlen_q, p.head_dim_v, 64),
        p,
    };
    const int64_t tiles = (p.seqlen_q + kTile.queries - 1) / kTile.queries * p.heads_q * p.batch;
    check(tiles <= 0x7fffffff, tiles, " tiles of queries: at most 2^31 - 1");
    const int64_t blocks = kTile.persistent && tiles > multiprocessors ? multiprocessors : tiles;
    launch(forward_kernel<T, kHeadDim, kVariant>, {blocks}, kTile.threads(),
           static_cast<int>(forward_shared_bytes(kHeadDim, kVariant)), stream, arguments);
}

template <typename T, int kHeadDim, int... kVariant>
void launch_one_of(std::integer_sequence<int, kVariant...>, int variant, const AttentionParams& p, int multiprocessors,
                   void* stream) {
    ((variant == kVariant ? launch_variant<T, kHeadDim, kVariant>(p, multiprocessors, stream) : void()), ...);
}

}  // namespace

template <typename T, int kHeadDim>
void forward(const AttentionParams& p, int variant, int multiprocessors, void* stream) {
    launch_one_of<T, kHeadDim>(std::make_integer_sequence<int, kVariants>{}, variant, p, multiprocessors, stream);
}

template void forward<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, int, int, void*);

}  // namespace fastattn::cuda::sm90
