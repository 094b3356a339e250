// The Hopper kernel for dQ in one order of summation, for one element type and head dimension.
#include "cuda/sm90/dq.h"

#include "cuda/launch.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/maps.h"

namespace fastattn::cuda::sm90 {
namespace {

template <typename T, int kHeadDim, bool kRagged>
FASTATTN_KERNEL((QueryGradient<T, kHeadDim, kRagged>::kThreads), 1)
dq_kernel(FASTATTN_CONSTANT QueryGradientArguments arguments) {
    const QueryGradient<T, kHeadDim, kRagged> block(arguments);
    if (!block.exists) return;
    if (thread_index() == 0) block.initialize();
    barrier();
    if (thread_index() < 128) {
        setmaxnreg_decrease<24>();
        if (thread_index() == 0) block.produce();
    } else {
        setmaxnreg_increase<240>();
        block.consume();
    }
}

}  // namespace

template <typename T, int kHeadDim>
void dq(const AttentionParams& p, void* stream) {
    using Block = QueryGradient<T, kHeadDim, false>;  // sizes and tiles are the same with kRagged
    constexpr QueryTile kTile = Block::kTile;
    const QueryGradientArguments arguments{
        query_map<typename Block::Queries>(p, p.q, p.head_dim_qk, kTile.queries),
        key_map<typename Block::Keys>(p, p.k, p.head_dim_qk, kTile.keys),
        key_map<typename Block::Values>(p, p.v, p.head_dim_v, kTile.keys),
        query_map<typename Block::Grads>(p, p.grad_out, p.head_dim_v, kTile.queries),
        query_map<typename Block::Queries>(p, p.dq, p.head_dim_qk, 64),
        p,
    };
    launch(is_ragged(p) ? dq_kernel<T, kHeadDim, true> : dq_kernel<T, kHeadDim, false>,
           {SequenceTiles<kTile.queries>::of_queries(p).count() * p.heads_q}, Block::kThreads, Block::kSharedBytes,
           stream, arguments);
}

template void dq<FASTATTN_DTYPE, FASTATTN_HEAD_DIM>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm90
