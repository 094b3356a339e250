// The Hopper forward on e4m3 for one head dimension.
#include "cuda/sm90/forward_fp8.h"

#include <utility>

#include "cuda/launch.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/maps.h"

namespace fastattn::cuda::sm90 {
namespace {

constexpr int kTransposeThreads = 256;

FASTATTN_KERNEL(kTransposeThreads, 1) transpose_values_kernel(FASTATTN_CONSTANT AttentionParams p) {
    transpose_values(p, block_index() * kTransposeThreads + thread_index());
}

template <int kHeadDim, int kVariant>
FASTATTN_KERNEL(e4m3_tile(kHeadDim, kVariant).tile.threads(), 1)
forward_fp8_kernel(FASTATTN_CONSTANT ForwardFp8Arguments arguments) {
    using Block = ForwardFp8<kHeadDim, kVariant>;
    const Block block(arguments);
    const int thread = thread_index();
    if (thread == 0) {
        for (const TensorMap* map : {&arguments.q, &arguments.k, &arguments.v, &arguments.out})
            prefetch_tensor_map(map);
        block.initialize();
    }
    barrier();
    if (thread >= 128) {
        setmaxnreg_increase<Block::kRegisters[1]>();
        block.consume();
    } else {
        setmaxnreg_decrease<Block::kRegisters[0]>();
        if (thread == 0) block.produce();
    }
}

// The same bytes as elements of two.
Tensor4 pairs(const Tensor4& x) { return {x.data, {x.stride[0] / 2, x.stride[1] / 2, x.stride[2] / 2, 1}}; }

template <int kHeadDim, int kVariant>
void launch_variant(const AttentionParams& p, int multiprocessors, void* stream) {
    using Kernel = ForwardFp8<kHeadDim, kVariant>;
    constexpr ForwardTile kTile = Kernel::kTile;
    constexpr DType kPair = DType::kBFloat16;  // of which nothing is looked at but its size
    const int64_t row = padded_keys(p), head = p.head_dim_v * row, transposed = p.batch * p.heads_k * head;
    const int64_t blocks = (transposed / 32 + kTransposeThreads - 1) / kTransposeThreads;
    launch(transpose_values_kernel, {blocks}, kTransposeThreads, 0, stream, p);

    const Tensor4 values = pairs({p.workspace, {p.heads_k * head, head, row, 1}});
    const ForwardFp8Arguments arguments{
        tensor_map<typename Kernel::Queries>(kPair, pairs(p.q), p.batch, p.heads_q, p.seqlen_q, p.head_dim_qk / 2, 64),
        tensor_map<typename Kernel::Keys>(kPair, pairs(p.k), p.batch, p.heads_k, p.seqlen_k, p.head_dim_qk / 2,
                                          kTile.keys),
        tensor_map<typename Kernel::Values>(kPair, values, p.batch, p.heads_k, p.head_dim_v, row / 2, kHeadDim),
        tensor_map<typename Kernel::Outputs>(kPair, p.out, p.batch, p.heads_q, p.seqlen_q, p.head_dim_v, 64),
        p,
    };
    const int64_t tiles = (p.seqlen_q + kTile.queries - 1) / kTile.queries * p.heads_q * p.batch;
    check(tiles <= 0x7fffffff, tiles, " tiles of queries: at most 2^31 - 1");
    const int64_t grid = kTile.persistent && tiles > multiprocessors ? multiprocessors : tiles;
    launch(forward_fp8_kernel<kHeadDim, kVariant>, {grid}, kTile.threads(),
           static_cast<int>(e4m3_shared_bytes(kHeadDim, kVariant)), stream, arguments);
}

template <int kHeadDim, int... kVariant>
void launch_one_of(std::integer_sequence<int, kVariant...>, int variant, const AttentionParams& p, int multiprocessors,
                   void* stream) {
    ((variant == kVariant ? launch_variant<kHeadDim, kVariant>(p, multiprocessors, stream) : void()), ...);
}

}  // namespace

template <int kHeadDim>
void forward_fp8(const AttentionParams& p, int variant, int multiprocessors, void* stream) {
    launch_one_of<kHeadDim>(std::make_integer_sequence<int, kVariants>{}, variant, p, multiprocessors, stream);
}

template void forward_fp8<FASTATTN_HEAD_DIM>(const AttentionParams&, int, int, void*);

}  // namespace fastattn::cuda::sm90
