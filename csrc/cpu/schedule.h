// How the heads of a call are spread over threads: many heads, one thread each; few heads, all threads on each in turn.
// Which of the two is chosen changes no result: a tile is computed the same way by whoever takes it.
#pragma once

#include <atomic>
#include <vector>

#include "scores.h"
#include "threads.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

// Runs pieces of work: run(count, piece(index)).
using Run = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

// Calls head(b, key_head, workspace, run) for each key head of each batch entry.
template <typename Workspace, typename Head>
void for_each_key_head(const AttentionParams& p, bool in_order, const Head& head) {
    const int64_t heads = p.batch * p.heads_k, threads = std::max<int64_t>(1, p.num_threads);
    const double work = static_cast<double>(p.heads_q / p.heads_k) * static_cast<double>(p.seqlen_q) *
                        static_cast<double>(p.seqlen_k) * static_cast<double>(p.head_dim_qk + p.head_dim_v);
    const bool one_thread_each = threads == 1 || heads >= 8 * threads || (heads >= threads && work < 4e6);
    if (one_thread_each && !in_order) {
        const int64_t some = heads >= 64 * threads ? 8 : 1;  // neighbours go to one thread, which may fetch ahead
        parallel_for(threads, count_of(heads, some), [&](int64_t item, int64_t) {
            const Run run = [](int64_t count, const std::function<void(int64_t)>& piece) {
                for (int64_t i = 0; i < count; ++i) piece(i);
            };
            for (int64_t index = item * some; index < std::min(heads, (item + 1) * some); ++index) {
                head(index / p.heads_k, index % p.heads_k, scratch<Workspace>(), run);
            }
        });
    } else {
        Workspace& workspace = scratch<Workspace>();
        const Run run = [threads](int64_t count, const std::function<void(int64_t)>& piece) {
            parallel_for(threads, count, [&](int64_t item, int64_t) { piece(item); });
        };
        for (int64_t index = 0; index < heads; ++index) head(index / p.heads_k, index % p.heads_k, workspace, run);
    }
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
