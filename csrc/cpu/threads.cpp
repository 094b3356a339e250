#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "attention.h"

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

// The items of one call, in as many ranges as it says, and what went wrong with one of them.
class Queue {
public:
    Queue(int64_t items, int64_t ranges, const std::function<void(int64_t)>& body)
        : ranges_(static_cast<size_t>(ranges)), body_(body) {
        for (int64_t r = 0; r < ranges; ++r) {
            ranges_[static_cast<size_t>(r)].next = items * r / ranges;
            ranges_[static_cast<size_t>(r)].end = items * (r + 1) / ranges;
        }
    }

    // A worker's own range first, then what others have left.
    void work(int64_t worker) {
        try {
            for (size_t turn = 0; turn < ranges_.size(); ++turn) {
                Range& range = ranges_[(static_cast<size_t>(worker) + turn) % ranges_.size()];
                for (;;) {
                    const int64_t item = range.next.fetch_add(1, std::memory_order_relaxed);
                    if (item >= range.end) break;
                    body_(item);
                }
            }
        } catch (...) {
            for (Range& range : ranges_) range.next.store(range.end, std::memory_order_relaxed);
            std::lock_guard<std::mutex> guard(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    struct alignas(64) Range {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    std::vector<Range> ranges_;
    const std::function<void(int64_t)>& body_;
    std::mutex mutex_;
    std::exception_ptr error_;
};

// Threads of our own.
class Pool {
public:
    // One call at a time has the pool; others do their work alone.
    void run(int64_t helpers, Queue& queue) {
        std::unique_lock<std::mutex> only_one(running_, std::try_to_lock);
        if (!only_one.owns_lock()) return queue.work(0);
        while (started_ < helpers) {
            std::thread(&Pool::serve, this, started_ + 1, generation_.load(std::memory_order_relaxed)).detach();
            ++started_;
        }
        queue_ = &queue;
        pending_.store(started_, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> guard(sleep_);
            active_ = helpers;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        queue.work(0);
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
            if (worker <= active_) queue_->work(worker);
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

template <typename Function>
Function symbol(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

// torch's own threads where they are OpenMP's: after each operation of torch's they wait for the next one by spinning,
// and threads beside them would share their cores with that. Ours elsewhere, and in a forked child, where GCC's library
// waits forever for threads that only the parent has. Never destroyed: threads sleep in it until the process ends.
struct Threads {
    Team team = nullptr;
    int (*number)() = nullptr;  // of the thread that asks, in its team
    Pool own;

    static Threads* of_openmp() {
        auto* found = new Threads;
        found->team = symbol<Team>("GOMP_parallel"), found->number = symbol<int (*)()>("omp_get_thread_num");
        if (found->number == nullptr) found->team = nullptr;
        return found;
    }

    void run(int64_t count, Queue& queue) {
        if (team == nullptr) return own.run(count - 1, queue);
        struct Shared {
            Queue& queue;
            int (*number)();
        } shared{queue, number};
        const auto work = [](void* argument) {
            const auto& shared = *static_cast<Shared*>(argument);
            shared.queue.work(shared.number());
        };
        team(work, &shared, static_cast<unsigned>(count), 0);
    }
};

Threads* threads = [] {
    pthread_atfork(nullptr, nullptr, leave_openmp);
    return Threads::of_openmp();
}();

}  // namespace

void wait_a_little(int spin) {
    if (spin < kSpins) {
        pause();
    } else {
        std::this_thread::yield();
    }
}

void leave_openmp() { threads = new Threads; }

void parallel_for(int64_t num_threads, int64_t items, const std::function<void(int64_t)>& body, bool in_order) {
    if (num_threads <= 1 || items <= 1) {
        for (int64_t item = 0; item < items; ++item) body(item);
        return;
    }
    Queue queue(items, in_order ? 1 : num_threads, body);
    // All threads, though the items be fewer: OpenMP ends those that a smaller team has no use for.
    threads->run(num_threads, queue);
    queue.rethrow();
}

}  // namespace fastattn::cpu
