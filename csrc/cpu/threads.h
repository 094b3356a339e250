// A pool of threads that outlives its calls: what a short attention call cannot afford is to start threads.
#pragma once

#include <cstdint>
#include <functional>

namespace fastattn::cpu {

// Calls body(item, worker) once for each item in [0, items), items taken in order from one queue by up to num_threads
// workers, worker in [0, num_threads). Returns when all are done; the first exception is rethrown.
// When another Python thread has the pool, or after a fork before a new pool is up, the caller does the work alone.
void parallel_for(int64_t num_threads, int64_t items, const std::function<void(int64_t, int64_t)>& body);

// What a loop that waits for another worker does in its `spin`th round.
void wait_a_little(int spin);

}  // namespace fastattn::cpu
