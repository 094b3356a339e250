// Which calls the Hopper forward on e4m3 takes, and how.
#include "cuda/sm90/dispatch_fp8.h"

#include <algorithm>
#include <sstream>

#include "cuda/launch.h"
#include "cuda/sm90/dispatch.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tiles.h"

namespace fastattn::cuda::sm90 {
namespace {

constexpr int64_t kMaxHeadDim = 256, kAlignment = 16;  // bytes, of what TMA reads; elements of e4m3

int head_dim_of(const AttentionParams& p) {
    const int64_t dim = std::max(p.head_dim_qk, p.head_dim_v);
    return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// Rows of 16-byte chunks that TMA can step to.
bool in_chunks(const Tensor4& x, int64_t batch, int64_t heads, int64_t seq, int64_t multiple) {
    const int64_t size[] = {batch, heads, seq};
    bool good = reinterpret_cast<uintptr_t>(x.data) % kAlignment == 0 && x.stride[3] == 1;
    for (int d = 0; d < 3; ++d) {
        const int64_t stride = x.stride[d];
        good = good && (size[d] == 1 || (stride > 0 && stride % multiple == 0 && stride < int64_t{1} << 39));
    }
    return good;
}

}  // namespace

std::string fp8_reason(const AttentionParams& p) {
    std::ostringstream text;
    for (const auto& [name, dim] : {std::pair{"head_dim_qk ", p.head_dim_qk}, std::pair{"head_dim_v ", p.head_dim_v}}) {
        if (dim % kAlignment != 0 || dim > kMaxHeadDim) {
            text << name << dim << ": must be a multiple of " << kAlignment << ", at most " << kMaxHeadDim;
            return text.str();
        }
    }
    if (!(p.softmax_scale > 0)) {
        text << "softmax_scale " << p.softmax_scale << ": must be positive";
    } else if (p.q.data && !(in_chunks(p.q, p.batch, p.heads_q, p.seqlen_q, kAlignment) &&
                             in_chunks(p.k, p.batch, p.heads_k, p.seqlen_k, kAlignment) && p.v.stride[3] == 1 &&
                             in_chunks(p.out, p.batch, p.heads_q, p.seqlen_q, kAlignment / 2))) {
        text << "strides of q or k are no multiples of " << kAlignment << ", or the last one is not 1";
    }
    return text.str();
}

std::string fp8_configuration(const AttentionParams& p) {
    const E4M3Tile found = e4m3_tile(head_dim_of(p), forward_variant(p));
    const ForwardTile& tile = found.tile;
    std::ostringstream text;
    text << "Hopper (sm_90a: TMA, wgmma of e4m3), forward, tiles of " << tile.queries << " queries x " << tile.keys
         << " keys, " << tile.stages << " stages" << (tile.ping_pong ? ", ping-pong" : "")
         << (tile.persistent ? ", persistent" : "") << (found.collect ? ", summed in float32" : "");
    return text.str();
}

int64_t fp8_workspace_bytes(const AttentionParams& p) {
    return p.batch * p.heads_k * p.head_dim_v * ((p.seqlen_k + 31) / 32 * 32);
}

void fp8_forward(const AttentionParams& p, void* stream) {
    check(p.workspace != nullptr, "the forward needs ", fp8_workspace_bytes(p), " bytes of workspace");
    const int dim = head_dim_of(p), variant = forward_variant(p);
    const auto units = static_cast<int>(multiprocessors(p.device));
    if (dim == 64) return forward_fp8<64>(p, variant, units, stream);
    if (dim == 128) return forward_fp8<128>(p, variant, units, stream);
    forward_fp8<256>(p, variant, units, stream);
}

}  // namespace fastattn::cuda::sm90
