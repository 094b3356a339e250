// Which calls the Hopper kernels take, and how.
#include "cuda/sm90/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm90/gradient_sums.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tiles.h"

namespace fastattn::cuda::sm90 {
namespace {

constexpr int64_t kFewQueries = 16, kMaxSplits = 128;

template <typename... Parts>
std::string words(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

// What the tensor memory accelerator asks of a (batch, heads, seq, head_dim) tensor.
std::string layout_reason(const char* name, const Tensor4& x, int64_t batch, int64_t heads, int64_t seq) {
    if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return words(name, ": begins at no multiple of 16 bytes");
    if (x.stride[3] != 1) return words(name, ": stride ", x.stride[3], " of the last dimension, must be 1");
    const int64_t size[] = {batch, heads, seq};
    for (int d = 0; d < 3; ++d) {
        const int64_t stride = x.stride[d];
        if (size[d] > 1 && (stride <= 0 || stride % 8 != 0 || stride >= int64_t{1} << 39)) {
            return words(name, ": stride ", stride, " of dimension ", d, ", must be a positive multiple of 8");
        }
    }
    return {};
}

std::string spec_reason(const AttentionParams& p) {
    if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return "dtype: float16 and bfloat16 only";
    if (p.mask.data) return "a mask";
    if (p.bias.data) return "a bias";
    if (p.dropout_threshold != 0) return "dropout";
    if (p.softcap != 0) return "softcap";
    if (p.alibi_slopes.data) return "alibi_slopes";
    if (p.sinks.data) return "sinks";
    if (p.q_segments.data || p.k_segments.data) return "segments";
    if (p.prefix_lens.data) return "prefix_lens";
    if (p.leftpad_k.data) return "leftpad_k";
    if (p.head_dim_qk % 8 != 0) return words("head_dim_qk ", p.head_dim_qk, ": must be a multiple of 8");
    if (p.head_dim_v % 8 != 0) return words("head_dim_v ", p.head_dim_v, ": must be a multiple of 8");
    return {};
}

// Of the kernels for many queries.
std::string long_reason(const AttentionParams& p) {
    if (p.page_size != 0) return words("paged keys: for at most ", kFewQueries, " queries");
    if (p.num_splits > 1) return words("num_splits ", p.num_splits);
    return {};
}

std::string first_of(std::initializer_list<std::string> reasons) {
    for (const std::string& reason : reasons) {
        if (!reason.empty()) return reason;
    }
    return {};
}

// Of q, k and what is like them.
std::string query_reason(const char* name, const AttentionParams& p, const Tensor4& x) {
    return layout_reason(name, x, batches_q(p), p.heads_q, rows_q(p));
}
std::string key_reason(const char* name, const AttentionParams& p, const Tensor4& x) {
    if (p.page_size != 0) return layout_reason(name, x, p.num_pages, p.heads_k, p.page_size);
    return layout_reason(name, x, batches_k(p), p.heads_k, rows_k(p));
}

std::string inputs_reason(const AttentionParams& p) {
    return first_of({query_reason("q", p, p.q), key_reason("k", p, p.k), key_reason("v", p, p.v)});
}

// Whether some key is invisible to some query.
bool is_banded(const AttentionParams& p) {
    const int64_t offset = p.relative_offset ? p.offset + p.seqlen_k - p.seqlen_q : p.offset;
    return offset + p.right < p.seqlen_k - 1 || offset - p.left > 1 - p.seqlen_q;
}
}  // namespace

int forward_variant(const AttentionParams& p) {
    if (const char* asked = std::getenv("FASTATTN_SM90_VARIANT")) {
        const int variant = std::atoi(asked);
        check(0 <= variant && variant < kVariants, "FASTATTN_SM90_VARIANT ", asked, ": this build has ", kVariants,
              " variants, from 0; FASTATTN_SM90_VARIANTS=1 builds those for timing");
        return is_ragged(p) ? std::max(variant, kBanded) : variant;
    }
    return is_banded(p) || is_ragged(p) ? kBanded : kFull;
}

namespace {

// Few queries: decode.h, which splits the keys.
bool is_decode(const AttentionParams& p) { return p.seqlen_q <= kFewQueries; }
int decode_head_dim(const AttentionParams& p) {
    const int64_t dim = std::max(p.head_dim_qk, p.head_dim_v);
    return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}
// As many parts as asked for; else as many as fill the machine once, a tile of keys at least to each.
int64_t decode_splits(const AttentionParams& p) {
    const int64_t tiles = (p.seqlen_k + kDecodeTile.keys - 1) / kDecodeTile.keys;
    const int64_t slots = decode_blocks(decode_head_dim(p)) * multiprocessors(p.device);
    const int64_t splits = p.num_splits > 0 ? p.num_splits : std::min(tiles, slots / (p.batch * p.heads_k));
    return std::max<int64_t>(1, std::min(splits, kMaxSplits));
}

int forward_head_dim(const AttentionParams& p) {
    const int64_t dim = std::max(p.head_dim_qk, p.head_dim_v);
    if (dim <= 64) return 64;
    if (dim <= 96) return 96;
    if (dim <= 128) return 128;
    return p.head_dim_qk <= 192 && p.head_dim_v <= value_dim(192) ? 192 : 256;
}
int backward_head_dim(const AttentionParams& p) {
    const int dim = forward_head_dim(p);
    return dim == 96 ? 128 : dim;
}

// Calls f(T{}, constant) for an element and one of the head dimensions.
template <int... kHeadDims, typename F>
void with_kernel(DType dtype, int head_dim, const F& f) {
    const auto with_element = [&](auto constant) {
        if (head_dim != constant) return;
        dtype == DType::kFloat16 ? f(Half{}, constant) : f(BFloat16{}, constant);
    };
    (with_element(std::integral_constant<int, kHeadDims>{}), ...);
}

}  // namespace

std::string forward_reason(const AttentionParams& p) {
    if (std::string reason = spec_reason(p); !reason.empty()) return reason;
    if (!(p.softmax_scale > 0)) return words("softmax_scale ", p.softmax_scale, ": must be positive");
    if (is_decode(p)) {
        if (p.page_size % 8 != 0) return words("page_size ", p.page_size, ": must be a multiple of 8");
        const int64_t rows = p.heads_q / p.heads_k * p.seqlen_q;
        if (rows > kDecodeTile.rows) {
            return words("seqlen_q ", p.seqlen_q, ": with ", p.heads_q / p.heads_k, " heads to a head of keys ", rows,
                         " rows, at most ", kDecodeTile.rows, " (or more than ", kFewQueries, " queries)");
        }
    } else if (std::string reason = long_reason(p); !reason.empty()) {
        return reason;
    }
    if (!p.q.data) return {};
    return first_of({inputs_reason(p), query_reason("out", p, p.out)});
}

std::string backward_reason(const AttentionParams& p) {
    if (std::string reason = spec_reason(p); !reason.empty()) return reason;
    if (std::string reason = long_reason(p); !reason.empty()) return reason;
    if (!p.q.data) return {};
    return first_of({inputs_reason(p), query_reason("grad_out", p, p.grad_out), query_reason("dq", p, p.dq),
                     key_reason("dk", p, p.dk), key_reason("dv", p, p.dv)});
}

std::string configuration(const AttentionParams& p, bool backward) {
    const char* packed = p.page_size != 0 ? ", paged keys" : p.total_q >= 0 ? ", packed sequences" : "";
    if (backward) {
        const KeyTile tile = key_tile(backward_head_dim(p));
        return words("Hopper (sm_90a: TMA, wgmma), backward, tiles of ", tile.queries, " queries x ", tile.keys,
                     " keys", packed);
    }
    if (is_decode(p)) {
        return words("Hopper (sm_90a: TMA), decoding, tiles of ", kDecodeTile.rows, " rows x ", kDecodeTile.keys,
                     " keys, ", decode_stages(decode_head_dim(p)), " stages, up to ", kMaxSplits, " splits of the keys",
                     packed);
    }
    const ForwardTile tile = forward_tile(forward_head_dim(p), forward_variant(p), is_ragged(p));
    return words("Hopper (sm_90a: TMA, wgmma), forward, tiles of ", tile.queries, " queries x ", tile.keys, " keys, ",
                 tile.stages, " stages", tile.ping_pong ? ", ping-pong" : "", tile.persistent ? ", persistent" : "",
                 packed);
}

int64_t forward_workspace_bytes(const AttentionParams& p) {
    if (!is_decode(p)) return 0;
    const int64_t splits = decode_splits(p);
    return splits == 1 ? 0 : 4 * splits * all_rows(p) * (p.head_dim_v + 1);
}

int64_t backward_workspace_bytes(const AttentionParams& p) {
    return sums_offset_bytes(p) + (p.deterministic ? 0 : 4 * sums_size(p, backward_head_dim(p)));
}

void attention_forward(const AttentionParams& p, void* stream) {
    if (is_decode(p)) {
        AttentionParams split = p;
        split.num_splits = decode_splits(p);
        check(split.num_splits == 1 || p.workspace != nullptr, "the forward needs ", forward_workspace_bytes(p),
              " bytes of workspace");
        return with_kernel<64, 128, 256>(p.dtype, decode_head_dim(p), [&](auto element, auto head_dim) {
            decode<decltype(element), head_dim>(split, stream);
        });
    }
    with_kernel<64, 96, 128, 192, 256>(p.dtype, forward_head_dim(p), [&](auto element, auto head_dim) {
        forward<decltype(element), head_dim>(p, forward_variant(p), static_cast<int>(multiprocessors(p.device)),
                                             stream);
    });
}

void attention_backward(const AttentionParams& p, void* stream) {
    with_kernel<64, 128, 192, 256>(p.dtype, backward_head_dim(p), [&](auto element, auto head_dim) {
        using T = decltype(element);
        AttentionParams rows_only = p;
        rows_only.deterministic = true;  // delta and lse; the sums of dQ are laid out otherwise here
        sm80::prepare<T>(rows_only, stream);
        if (p.deterministic) {
            dkdv<T, head_dim>(p, stream);
            dq<T, head_dim>(p, stream);
        } else {
            clear_dq_sums<T, head_dim>(p, stream);
            dkdv<T, head_dim>(p, stream);
            convert_dq<T, head_dim>(p, stream);
        }
    });
}

}  // namespace fastattn::cuda::sm90
