#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace fastattn::cpu {
namespace {

constexpr int kSpins = 4000;  // some 50 microseconds: the gap between two phases of one call

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
public:
    void run(int64_t num_threads, int64_t items, const std::function<void(int64_t, int64_t)>& body) {
        std::unique_lock<std::mutex> only_one(running_, std::try_to_lock);
        const int64_t helpers = std::min(num_threads, items) - 1;
        if (helpers <= 0 || !only_one.owns_lock()) {
            for (int64_t item = 0; item < items; ++item) body(item, 0);
            return;
        }
        while (started_ < helpers) {
            std::thread(&Pool::serve, this, ++started_, generation_.load(std::memory_order_relaxed)).detach();
        }
        body_ = &body;
        items_ = items;
        next_.store(0, std::memory_order_relaxed);
        error_ = nullptr;
        pending_.store(started_, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> guard(sleep_);
            active_ = helpers;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        work(0);
        for (int spin = 0; pending_.load(std::memory_order_acquire) != 0; ++spin) wait_a_little(spin);
        if (error_) std::rethrow_exception(error_);
    }

private:
    void work(int64_t worker) {
        try {
            for (;;) {
                const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
                if (item >= items_) return;
                (*body_)(item, worker);
            }
        } catch (...) {
            next_.store(items_, std::memory_order_relaxed);
            std::lock_guard<std::mutex> guard(sleep_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void serve(int64_t worker, uint64_t seen) {
        for (;;) {
            int spin = 0;
            while (generation_.load(std::memory_order_acquire) == seen && ++spin < kSpins) pause();
            if (generation_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
            }
            ++seen;
            if (worker <= active_) work(worker);
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex running_;
    int64_t started_ = 0;

    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    int64_t active_ = 0;

    const std::function<void(int64_t, int64_t)>* body_ = nullptr;
    int64_t items_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<int64_t> pending_{0};
    std::exception_ptr error_;
};

// Never destroyed: its threads sleep in it until the process ends. A forked child has none of them, so it gets its own.
Pool* pool = nullptr;

Pool& current_pool() {
    static const bool made = [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
        return true;
    }();
    (void)made;
    return *pool;
}

}  // namespace

void wait_a_little(int spin) {
    if (spin < kSpins) {
        pause();
    } else {
        std::this_thread::yield();
    }
}

void parallel_for(int64_t num_threads, int64_t items, const std::function<void(int64_t, int64_t)>& body) {
    current_pool().run(num_threads, items, body);
}

}  // namespace fastattn::cpu
