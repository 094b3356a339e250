#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

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

// The items of one call, and what went wrong with one of them.
class Queue {
public:
    Queue(int64_t items, const std::function<void(int64_t)>& body) : items_(items), body_(body) {}

    void work() {
        try {
            for (;;) {
                const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
                if (item >= items_) return;
                body_(item);
            }
        } catch (...) {
            next_.store(items_, std::memory_order_relaxed);
            std::lock_guard<std::mutex> guard(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    const int64_t items_;
    const std::function<void(int64_t)>& body_;
    std::atomic<int64_t> next_{0};
    std::mutex mutex_;
    std::exception_ptr error_;
};

// Threads of our own.
class Pool {
public:
    // One call at a time has the pool; others do their work alone.
    void run(int64_t helpers, Queue& queue) {
        std::unique_lock<std::mutex> only_one(running_, std::try_to_lock);
        if (!only_one.owns_lock()) return queue.work();
        while (started_ < helpers) {
            std::thread(&Pool::serve, this, ++started_, generation_.load(std::memory_order_relaxed)).detach();
        }
        queue_ = &queue;
        pending_.store(started_, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> guard(sleep_);
            active_ = helpers;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        queue.work();
        for (int spin = 0; pending_.load(std::memory_order_acquire) != 0; ++spin) wait_a_little(spin);
    }

private:
    void serve(int64_t worker, uint64_t seen) {
        for (;;) {
            int spin = 0;
            while (generation_.load(std::memory_order_acquire) == seen && ++spin < kSpins) pause();
            if (generation_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
            }
            ++seen;
            if (worker <= active_) queue_->work();
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex running_;
    int64_t started_ = 0;
    Queue* queue_ = nullptr;

    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    int64_t active_ = 0;
    std::atomic<int64_t> pending_{0};
};

// The entry point of GCC's compiled `#pragma omp parallel`, which LLVM's and Intel's libraries have too.
using Team = void (*)(void (*work)(void*), void* argument, unsigned num_threads, unsigned flags);

// torch's own threads where they are OpenMP's: after each operation of torch's they wait for the next one by spinning,
// and threads beside them would share their cores with that. Ours elsewhere, and in a forked child, where GCC's library
// waits forever for threads that only the parent has. Never destroyed: threads sleep in it until the process ends.
struct Threads {
    Team openmp;
    Pool own;

    void run(int64_t count, Queue& queue) {
        if (openmp == nullptr) return own.run(count - 1, queue);
        openmp([](void* shared) { static_cast<Queue*>(shared)->work(); }, &queue, static_cast<unsigned>(count), 0);
    }
};

Threads* threads = [] {
    pthread_atfork(nullptr, nullptr, [] { threads = new Threads{nullptr, {}}; });
    return new Threads{reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")), {}};
}();

}  // namespace

void wait_a_little(int spin) {
    if (spin < kSpins) {
        pause();
    } else {
        std::this_thread::yield();
    }
}

void parallel_for(int64_t num_threads, int64_t items, const std::function<void(int64_t)>& body) {
    Queue queue(items, body);
    if (num_threads <= 1 || items <= 1) {
        queue.work();
    } else {
        // All of them, though the items be fewer: OpenMP ends threads that a smaller team has no use for.
        threads->run(num_threads, queue);
    }
    queue.rethrow();
}

}  // namespace fastattn::cpu
