// The Hopper forward for one element type and head dimension.
#include "cuda/sm90/forward.h"

#include <type_traits>
#include <utility>

#include "cuda/launch.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/maps.h"

namespace fastattn::cuda::sm90 {
namespace {

template <typename T, int kHeadDim, int kVariant, bool kRagged>
FASTATTN_KERNEL(forward_tile(kHeadDim, kVariant).threads(), 1)
forward_kernel(FASTATTN_CONSTANT ForwardArguments arguments) {
    using Block = Forward<T, kHeadDim, kVariant, kRagged>;
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

template <typename T, int kHeadDim, int kVariant, bool kRagged>
void launch_variant(const AttentionParams& p, int multiprocessors, void* stream) {
    using Kernel = Forward<T, kHeadDim, kVariant, kRagged>;
    constexpr ForwardTile kTile = Kernel::kTile;
    const ForwardArguments arguments{
        query_map<typename Kernel::Queries>(p, p.q, p.head_dim_qk, kTile.queries),
        key_map<typename Kernel::Keys>(p, p.k, p.head_dim_qk, kTile.keys),
        key_map<typename Kernel::Values>(p, p.v, p.head_dim_v, kTile.keys),
        query_map<typename Kernel::Outputs>(p, p.out, p.head_dim_v, 64),
        p,
    };
    const int64_t tiles = SequenceTiles<kTile.queries>::of_queries(p).count() * p.heads_q;
    check(tiles <= 0x7fffffff, tiles, " tiles of queries: at most 2^31 - 1");
    const int64_t blocks = kTile.persistent && tiles > multiprocessors ? multiprocessors : tiles;
    launch(forward_kernel<T, kHeadDim, kVariant, kRagged>, {blocks}, kTile.threads(),
           static_cast<int>(forward_shared_bytes(kHeadDim, kVariant)), stream, arguments);
}

template <typename T, int kHeadDim, int... kVariant>
void launch_one_of(std::integer_sequence<int, kVariant...>, int variant, const AttentionParams& p, int multiprocessors,
                   void* stream) {
    const auto try_one = [&](auto constant) {
        if (variant != constant) return;
        if (!is_ragged(p)) return launch_variant<T, kHeadDim, constant, false>(p, multiprocessors, stream);
        if constexpr (constant != kFull) launch_variant<T, kHeadDim, constant, true>(p, multiprocessors, stream);
    };
    (try_one(std::integral_constant<int, kVariant>{}), ...);
}

}  // namespace

template <typename T, int kHeadDim>
void forward(const AttentionParams& p, int variant, int multiprocessors, void* stream) {
    launch_one_of<T, kHeadDim>(std::make_integer_sequence<int, kVariants>{}, variant, p, multiprocessors, stream);
}

template void forward<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, int, int, void*);

}  // namespace fastattn::cuda::sm90
