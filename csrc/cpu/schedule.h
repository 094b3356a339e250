// How the heads of a call are spread over threads: many heads, one thread each; few heads, all threads on each in turn.
// Which of the two is chosen changes no result: a tile is computed the same way by whoever takes it.
#pragma once

#include <atomic>
#include <vector>

#include "scores.h"
#include "threads.h"

namespace fastattn::cpu::FASTATTN_CPU_ISA {

constexpr int64_t kQueryTile = 96;  // rows of a tile: a multiple of kTileRows
constexpr int64_t kKeyTile = 256;   // columns of a tile: a multiple of every panel width; 96 x 256 floats fill 96 KiB

// Runs pieces of work: run(count, piece(index)).
using Run = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

// Scratch memory of the calling thread, kept from call to call: what a short call cannot afford is fresh pages.
template <typename Tile>
Tile& scratch() {
    static thread_local Tile tile;
    return tile;
}

// Calls head(b, key_head, workspace, run) for each key head of each batch entry.
template <typename Workspace, typename Head>
void for_each_key_head(const AttentionParams& p, bool in_order, const Head& head) {
    const int64_t heads = p.batch * p.heads_k, threads = std::max<int64_t>(1, p.num_threads);
    const double work = static_cast<double>(p.heads_q / p.heads_k) * static_cast<double>(p.seqlen_q) *
                        static_cast<double>(p.seqlen_k) * static_cast<double>(p.head_dim_qk + p.head_dim_v);
    const bool one_thread_each = threads == 1 || heads >= 8 * threads || (heads >= threads && work < 4e6);
    if (one_thread_each && !in_order) {
        std::vector<Workspace> workspaces(static_cast<size_t>(std::min(threads, heads)));
        parallel_for(threads, heads, [&](int64_t index, int64_t worker) {
            const Run run = [](int64_t count, const std::function<void(int64_t)>& piece) {
                for (int64_t item = 0; item < count; ++item) piece(item);
            };
            head(index / p.heads_k, index % p.heads_k, workspaces[static_cast<size_t>(worker)], run);
        });
    } else {
        Workspace workspace;
        const Run run = [threads](int64_t count, const std::function<void(int64_t)>& piece) {
            parallel_for(threads, count, [&](int64_t item, int64_t) { piece(item); });
        };
        for (int64_t index = 0; index < heads; ++index) head(index / p.heads_k, index % p.heads_k, workspace, run);
    }
}

// The columns that a block of rows of a tile has to look at: those its rows see, widened to whole panels.
template <typename C>
struct Span {
    int64_t first, last;  // within the tile

    Span(int64_t low, int64_t high, int64_t tile_first, int64_t tile_last)
        : first(std::max(low, tile_first) / kPanel<C> * kPanel<C> - tile_first),
          last(std::min(round_up(std::max<int64_t>(high, 0), kPanel<C>), tile_last) - tile_first) {}
    bool empty() const { return first >= last; }
    bool holds(int64_t panel) const { return first <= panel && panel < last; }
};

}  // namespace fastattn::cpu::FASTATTN_CPU_ISA
