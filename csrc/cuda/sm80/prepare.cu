// What the backward computes before and after its passes: delta and lse of each query; dQ from its float sums.
#include "cuda/launch.h"
#include "cuda/online_softmax.h"
#include "cuda/sm80/backward.h"
#include "cuda/sm80/kernels.h"

namespace fastattn::cuda::sm80 {
namespace {

constexpr int kThreads = 128;
constexpr int kRowsPerBlock = kThreads / 4;

// Four threads per row: delta = rowsum(dO * O) - dlse; lse, or +inf where it is -inf; zeros where dQ will be summed.
template <typename T>
FASTATTN_KERNEL(kThreads, 1)
prepare_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int64_t row = block_index() * kRowsPerBlock + thread_index() / 4;
    const bool exists = row < all_rows(p);
    const TableRow at = TableRow::of(p, row);
    const int first = thread_index() % 4;
    float delta = 0.f;
    if (exists) {
        const Matrix<const T> out = row_matrix<const T>(p.out, at, p.head_dim_v);
        const Matrix<const T> grad_out = row_matrix<const T>(p.grad_out, at, p.head_dim_v);
        if (in_chunks(out) && in_chunks(grad_out)) {
            for (int col = 8 * first; col < out.cols; col += 32) {
                const Words4 x = load_global(reinterpret_cast<const Words4*>(out.data + col));
                const Words4 y = load_global(reinterpret_cast<const Words4*>(grad_out.data + col));
                delta += dot<T>(x.x, y.x) + dot<T>(x.y, y.y) + dot<T>(x.z, y.z) + dot<T>(x.w, y.w);
            }
        } else {
            for (int col = first; col < out.cols; col += 4) {
                delta += to_float(load_global(&out.data[col * out.col_stride])) *
                         to_float(load_global(&grad_out.data[col * grad_out.col_stride]));
            }
        }
    }
    delta = quad_sum(delta);
    if (!exists) return;
    if (first == 0) {
        if (p.grad_lse.data) {
            delta -= load_global(static_cast<const float*>(p.grad_lse.data) + at.offset(p.grad_lse));
        }
        const float lse = load_global(static_cast<const float*>(p.lse.data) + at.offset(p.lse));
        store_global(delta_rows(p) + row, delta);
        store_global(lse_rows(p) + row, lse == -INFINITY ? INFINITY : lse);
    }
    if (p.deterministic) return;
    for (int64_t col = first; col < p.head_dim_qk; col += 4) store_global(dq_sums(p) + row * p.head_dim_qk + col, 0.f);
}

template <typename T>
FASTATTN_KERNEL(kThreads, 1)
convert_dq_kernel(FASTATTN_CONSTANT AttentionParams p) {
    const int pairs = static_cast<int>(p.head_dim_qk + 1) / 2;
    const int64_t n = block_index() * kThreads + thread_index(), row = n / pairs;
    if (row >= all_rows(p)) return;
    const int col = static_cast<int>(n % pairs) * 2;
    const float* sums = dq_sums(p) + row * p.head_dim_qk + col;
    const float scale = static_cast<float>(p.softmax_scale);
    const Matrix<T> dq = row_matrix<T>(p.dq, TableRow::of(p, row), p.head_dim_qk);
    store_pair(dq.data, dq.col_stride, dq.cols, col, scale * load_global(sums),
               col + 1 < dq.cols ? scale * load_global(sums + 1) : 0.f);
}

}  // namespace

template <typename T>
void prepare(const AttentionParams& p, void* stream) {
    const int64_t rows = all_rows(p);
    launch(prepare_kernel<T>, {(rows + kRowsPerBlock - 1) / kRowsPerBlock}, kThreads, 0, stream, p);
}

template <typename T>
void convert_dq(const AttentionParams& p, void* stream) {
    const int64_t pairs = all_rows(p) * ((p.head_dim_qk + 1) / 2);
    launch(convert_dq_kernel<T>, {(pairs + kThreads - 1) / kThreads}, kThreads, 0, stream, p);
}

template void prepare<FASTATTN_DTYPE>(const AttentionParams&, void*);
template void convert_dq<FASTATTN_DTYPE>(const AttentionParams&, void*);

}  // namespace fastattn::cuda::sm80
