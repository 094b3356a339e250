// How the heads of a call are spread over threads: one thread each, so that a head's keys stay with one core and
// threads wait for each other once; those left over in the last round, if there are few rounds, by all threads
// together. Which of the two is chosen changes no result: a tile is computed the same way by whoever takes it.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
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
    const bool even = p.cu_seqlens_q.data == nullptr && p.cu_seqlens_k.data == nullptr && p.seqused_k.data == nullptr;
    const bool many = heads >= 8 * threads || (heads >= threads && work < 4e6);
    const int64_t own = in_order ? 0 : threads == 1 || many ? heads : even ? heads - heads % threads : 0;
    const int64_t some = own >= 64 * threads ? 8 : 1;  // neighbours go to one thread, which may fetch ahead
    parallel_for(
        threads, count_of(own, some),
        [&](int64_t item) {
            const Run run = [](int64_t count, const std::function<void(int64_t)>& piece) {
                for (int64_t i = 0; i < count; ++i) piece(i);
            };
            for (int64_t index = item * some; index < std::min(own, (item + 1) * some); ++index) {
                head(index / p.heads_k, index % p.heads_k, scratch<Workspace>(), run);
            }
        },
        false);
    const Run run = [threads](int64_t count, const std::function<void(int64_t)>& piece) {
        parallel_for(threads, count, piece);
    };
    for (int64_t index = own; index < heads; ++index) {
        head(index / p.heads_k, index % p.heads_k, scratch<Workspace>(), run);
    }
}

// Calls part(b, key_head, split, index) for each of the parts into which each key head's keys are split, and
// combine(b, key_head) when all parts of a key head are done.
template <typename Part, typename Combine>
void for_each_part(const AttentionParams& p, int64_t splits, const Part& part, const Combine& combine) {
    const int64_t heads = p.batch * p.heads_k;
    std::vector<std::atomic<int64_t>> done(static_cast<size_t>(heads));
    const auto one = [&](int64_t index) {
        const int64_t head = index / splits, b = head / p.heads_k, head_k = head % p.heads_k;
        part(b, head_k, index % splits, index);
        auto& count = done[static_cast<size_t>(head)];
        if (count.fetch_add(1, std::memory_order_acq_rel) + 1 == splits) combine(b, head_k);
    };
    parallel_for(p.num_threads, heads * splits, one, false);
}

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
