// The Hopper forward for one element type and head dimension.
#include "cuda/sm90/forward.h"

#include "cuda/launch.h"
#include "cuda/sm90/kernels.h"
#include "cuda/tensor_map.h"

namespace fastattn::cuda::sm90 {
namespace {

template <typename T, int kHeadDim, int kVariant>
FASTATTN_KERNEL(forward_tile(kHeadDim, kVariant).threads(), 1)
forward_kernel(FASTATTN_CONSTANT ForwardArguments arguments) {
    using Block = Forward<T, kHeadDim, kVariant>;
    const Block block(arguments);
    if (thread_index() == 0) {
        prefetch_tensor_map(arguments.q);
        prefetch_tensor_map(arguments.k);
        prefetch_tensor_map(arguments.v);
        prefetch_tensor_map(arguments.out);
        block.initialize();
    }
    barrier();
    if (thread_index() < 128) {
        decrease_registers<Block::kProducerRegisters>();
        if (thread_index() == 0) block.produce();
    } else {
        increase_registers<Block::kConsumerRegisters>();
        block.consume();
    }
}

// Boxes of one span and `rows` rows of a (batch, heads, seq, head_dim) tensor. The stride of a dimension of size 1 is
// never used, but looked at.
template <typename Tile>
TensorMap tensor_map(DType dtype, const Tensor4& x, int64_t batch, int64_t heads, int64_t seq, int64_t dim, int rows) {
    const auto stride = [&](int d, int64_t size) { return size == 1 ? int64_t{8} : x.stride[d]; };
    return make_tensor_map(dtype, x.data, {dim, seq, heads, batch}, {stride(2, seq), stride(1, heads), stride(0, batch)},
                           Tile::kSpan, rows);
}

template <typename T, int kHeadDim, int kVariant>
void launch_variant(const AttentionParams& p, int multiprocessors, void* stream) {
    using Kernel = Forward<T, kHeadDim, kVariant>;
    constexpr ForwardTile kTile = Kernel::kTile;
    const ForwardArguments arguments{
        tensor_map<typename Kernel::Queries>(p.dtype, p.q, p.batch, p.heads_q, p.seqlen_q, p.head_dim_qk, kTile.queries),
        tensor_map<typename Kernel::Keys>(p.dtype, p.k, p.batch, p.heads_k, p.seqlen_k, p.head_dim_qk, kTile.keys),
        tensor_map<typename Kernel::Values>(p.dtype, p.v, p.batch, p.heads_k, p.seqlen_k, p.head_dim_v, kTile.keys),
        tensor_map<typename Kernel::Outputs>(p.dtype, p.out, p.batch, p.heads_q, p.seqlen_q, p.head_dim_v, 64),
        p,
    };
    const int64_t tiles = (p.seqlen_q + kTile.queries - 1) / kTile.queries * p.heads_q * p.batch;
    const int64_t blocks = kTile.persistent && tiles > multiprocessors ? multiprocessors : tiles;
    launch(forward_kernel<T, kHeadDim, kVariant>, {blocks}, kTile.threads(),
           static_cast<int>(forward_shared_bytes(kHeadDim, kVariant)), stream, arguments);
}

}  // namespace

template <typename T, int kHeadDim>
void forward(const AttentionParams& p, int variant, int multiprocessors, void* stream) {
    if (variant == kFull) return launch_variant<T, kHeadDim, kFull>(p, multiprocessors, stream);
    launch_variant<T, kHeadDim, kBanded>(p, multiprocessors, stream);
}

template void forward<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, int, int, void*);

}  // namespace fastattn::cuda::sm90
