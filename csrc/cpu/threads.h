// Threads that outlive a call: what a short attention call cannot afford is to start some.
#pragma once

#include <cstdint>
#include <functional>

namespace fastattn::cpu {

// Calls body(item) once for each item in [0, items), items taken in order from one queue by num_threads threads at
// most. Returns when all are done; the first exception is rethrown. Several threads may call it at once.
void parallel_for(int64_t num_threads, int64_t items, const std::function<void(int64_t)>& body);

// What a loop that waits for another thread does in its `spin`th round.
void wait_a_little(int spin);

}  // namespace fastattn::cpu
