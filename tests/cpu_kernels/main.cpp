// Drives the CPU kernels of one instruction set (FASTATTN_CPU_ISA) without Python, to be built with sanitizers: tensors
// lie in allocations of exactly their size, so that AddressSanitizer sees the first byte read or written beyond them.
// Also: canaries between the rows of strided results.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/decode.h"
#include "cpu/pack.h"
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn::cpu::FASTATTN_CPU_ISA {
void attention_forward(const AttentionParams& p);
void attention_backward(const AttentionParams& p);
}  // namespace fastattn::cpu::FASTATTN_CPU_ISA

namespace {

using namespace fastattn;
namespace kernels = fastattn::cpu::FASTATTN_CPU_ISA;

uint64_t state = 88172645463325252ull;
uint64_t next() { return state ^= state << 13, state ^= state >> 7, state ^= state << 17; }
int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
}
double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53 * 2 - 1; }

[[noreturn]] void fail(const char* what, double value) {
    std::printf("FAILED: %s: %.9g\n", what, value);
    std::exit(1);
}

constexpr double kCanary = 77.0;

// A (batch, heads, seq, dim) tensor with gaps of `gap` elements between rows that nobody may touch.
template <typename T>
struct Held {
    int64_t rows, dim, row;
    std::unique_ptr<T[]> data;
    Tensor4 tensor;

    Held(int64_t batch, int64_t heads, int64_t seq, int64_t dim_, int64_t gap, bool random)
        : rows(batch * heads * seq), dim(dim_), row(dim_ + gap), data(new T[static_cast<size_t>(rows * row - gap)]) {
        for (int64_t i = 0; i < rows * row - gap; ++i) {
            kernels::narrow(random && i % row < dim ? static_cast<float>(uniform()) : static_cast<float>(kCanary),
                            data[static_cast<size_t>(i)]);
        }
        tensor = {data.get(), {heads * seq * row, seq * row, row, 1}};
    }
    void check(const char* name) const {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t d = 0; d < row && i * row + d < rows * row - (row - dim); ++d) {
                const double x = static_cast<double>(kernels::widen(data[static_cast<size_t>(i * row + d)]));
                if (d < dim ? !(std::fabs(x) < 70) : x != kCanary) fail(name, x);
            }
        }
    }
};

// few: up to 16 rows of queries to a key head, over keys that are read where they lie, in pages or not.
template <typename T, typename C>
void run_once(DType dtype, bool few) {
    AttentionParams p{};
    p.dtype = dtype, p.bias_dtype = dtype;
    p.batch = between(1, 2), p.heads_k = between(1, 2), p.heads_q = p.heads_k * between(1, 3);
    p.seqlen_q = next() % 3 == 0 ? between(1, 5) : between(1, 150), p.seqlen_k = between(1, 330);
    p.head_dim_qk = between(1, 70), p.head_dim_v = between(1, 70);
    if (few) {
        const int64_t rows = between(1, 16);
        p.seqlen_q = rows % 2 == 0 && next() % 2 ? 2 : 1, p.heads_q = p.heads_k * rows / p.seqlen_q;
        p.seqlen_k = between(256, next() % 2 ? 500 : 1400);
        p.head_dim_qk = 32 * between(1, 8), p.head_dim_v = 32 * between(1, 8);
    }
    p.softmax_scale = 0.2;
    p.left = next() % 3 == 0 ? between(0, 60) : int64_t(1) << 40;
    p.right = next() % 3 == 0 ? between(0, 60) : int64_t(1) << 40;
    p.offset = between(-20, 20);
    p.total_q = p.total_k = -1;
    p.num_threads = between(1, 3);
    p.num_splits = next() % 4 == 0 ? 3 : 0;
    const int64_t seed = 5, gap = few && next() % 2 ? 0 : between(0, 3);
    if (next() % 4 == 0) p.dropout_threshold = 1ull << 30, p.dropout_scale = 4.0 / 3, p.dropout_seed = &seed;
    if (next() % 4 == 0) p.softcap = 1.5;
    const int64_t page_sizes[] = {1, 7, 16, 48, 64, 256}, page = page_sizes[next() % 6];
    const bool paged = few && next() % 3 == 0;
    const int64_t pages = kernels::count_of(p.seqlen_k, page), entries = paged ? p.batch * pages : p.batch;
    const int64_t rows_k = paged ? page : p.seqlen_k;
    std::vector<int32_t> used(static_cast<size_t>(p.batch)), table(static_cast<size_t>(p.batch * pages), 1 << 28);
    if (paged) {  // pages in any order; beyond the keys in use the table names none
        for (int64_t b = 0; b < p.batch; ++b) {
            used[static_cast<size_t>(b)] = static_cast<int32_t>(between(1, p.seqlen_k));
            for (int64_t i = 0; i < kernels::count_of(used[static_cast<size_t>(b)], page); ++i) {
                table[static_cast<size_t>(b * pages + i)] = static_cast<int32_t>((i * p.batch + b) * 7919 % entries);
            }
        }
        p.block_table = {table.data(), {pages, 1}}, p.page_size = page, p.num_pages = entries;
        p.seqused_k = {used.data(), {1, 0}}, p.seqlen_k = pages * page;
    }
    Held<T> q(p.batch, p.heads_q, p.seqlen_q, p.head_dim_qk, gap, true),
        k(entries, p.heads_k, rows_k, p.head_dim_qk, gap, true);
    Held<T> v(entries, p.heads_k, rows_k, p.head_dim_v, gap, true),
        out(p.batch, p.heads_q, p.seqlen_q, p.head_dim_v, gap, false);
    Held<T> grad(p.batch, p.heads_q, p.seqlen_q, p.head_dim_v, gap, true);
    Held<T> dq(p.batch, p.heads_q, p.seqlen_q, p.head_dim_qk, gap, false),
        dk(p.batch, p.heads_k, p.seqlen_k, p.head_dim_qk, gap, false);
    Held<T> dv(p.batch, p.heads_k, p.seqlen_k, p.head_dim_v, gap, false);
    Held<T> bias(1, p.heads_q, p.seqlen_q, p.seqlen_k, 0, true), dbias(1, p.heads_q, p.seqlen_q, p.seqlen_k, 0, false);
    Held<C> lse(p.batch, p.heads_q, p.seqlen_q, 1, 0, false);
    std::vector<uint8_t> visible(static_cast<size_t>(p.batch * p.seqlen_k));
    for (auto& x : visible) x = next() % 3 != 0;
    p.q = q.tensor, p.k = k.tensor, p.v = v.tensor, p.out = out.tensor, p.lse = lse.tensor;
    if (next() % 3 == 0) p.mask = {visible.data(), {p.seqlen_k, 0, 0, 1}};
    const bool biased = next() % 3 == 0;
    if (biased) p.bias = bias.tensor, p.bias.stride[0] = 0;
    kernels::attention_forward(p);
    out.check("out");
    if (paged) return;
    p.grad_out = grad.tensor, p.dq = dq.tensor, p.dk = dk.tensor, p.dv = dv.tensor;
    if (biased) {
        p.dbias = dbias.tensor;
        const int64_t shape[4] = {1, p.heads_q, p.seqlen_q, p.seqlen_k};
        std::copy(shape, shape + 4, p.bias_shape);
    }
    kernels::attention_backward(p);
    dq.check("dq"), dk.check("dk"), dv.check("dv");
    if (biased) dbias.check("dbias");
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) fail("no leave to use AMX", 0);
#endif
    for (int i = 0; i < 50; ++i) {
        run_once<kernels::BFloat16, float>(DType::kBFloat16, i % 2 != 0);
        run_once<float, float>(DType::kFloat32, i % 2 != 0);
        run_once<kernels::Half, float>(DType::kFloat16, i % 2 != 0);
        run_once<double, double>(DType::kFloat64, i % 2 != 0);
    }
    std::printf("200 calls, forward and backward: clean\n");
}
