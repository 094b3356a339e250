// Threads that outlive a call: what a short attention call cannot afford is to start some.
#pragma once

#include <cstdint>
#include <functional>

namespace fastattn::cpu {

// Calls body(item) once for each item in [0, items) on num_threads threads at most. In order: items are taken from one
// queue, so an item may wait for earlier ones. Else each thread begins with a range of its own, the same in every call,
// whose data its caches may hold. Returns when all are done; the first exception is rethrown. Several threads may call
// it at once.
void parallel_for(int64_t num_threads, int64_t items, const std::function<void(int64_t)>& body, bool in_order = true);

// What a loop that waits for another thread does in its `spin`th round.
void wait_a_little(int spin);

}  // namespace fastattn::cpu
