#include "thread_pool.h"

#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace llama_fast {
namespace {

// Between two ops of a step Python runs for 5 to 50 us; waking a sleeping thread costs about as much again. Longer, and
// the pool would take cycles from torch's own threads.
constexpr int kSpins = 4000;
constexpr int kMaxThreads = 1023;
constexpr int64_t kMaxTasks = (int64_t{1} << 24) - 1;

// Rounding to nearest with subnormals kept, whatever the calling thread has set (torch.set_flush_denormal, libraries
// built with -ffast-math): a result must not depend on which thread took its task.
class StandardRounding {
   public:
    StandardRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~StandardRounding() { _mm_setcsr(saved_); }
    StandardRounding(const StandardRounding&) = delete;
    StandardRounding& operator=(const StandardRounding&) = delete;

   private:
    unsigned saved_;
};

class ThreadPool {
   public:
    void run(int64_t num_tasks, int num_threads, Task task, void* context) {
        std::lock_guard<std::mutex> one_job(mutex_);
        grow(num_threads - 1);
        task_ = task;
        context_ = context;
        num_tasks_ = num_tasks;
        error_ = nullptr;
        done_.store(0, std::memory_order_relaxed);
        // Publishes the fields above. A worker reads them only after it took a task, and until that task is done
        // this function does not return.
        tickets_.store(pack(num_threads - 1, num_tasks), std::memory_order_release);
        jobs_.fetch_add(1, std::memory_order_release);
        jobs_.notify_all();
        while (run_one(0)) {
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) != num_tasks; ++spins) {
            // Later the core is given away: the thread that is waited for may not be running.
            spins < kSpins ? _mm_pause() : std::this_thread::yield();
        }
        if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
    }

   private:
    // Workers of the job and tasks not yet taken in one word: both belong to the same job whenever it is read.
    static uint64_t pack(int num_workers, int64_t tasks_left) {
        return static_cast<uint64_t>(num_workers) << 24 | static_cast<uint64_t>(tasks_left);
    }

    // Takes and runs a task unless none is left or the job wants fewer workers. The caller is worker 0.
    bool run_one(int worker) {
        uint64_t tickets = tickets_.load(std::memory_order_acquire);
        do {
            if ((tickets & kMaxTasks) == 0 || worker > static_cast<int>(tickets >> 24)) return false;
        } while (!tickets_.compare_exchange_weak(tickets, tickets - 1, std::memory_order_acq_rel));
        try {
            task_(context_, num_tasks_ - static_cast<int64_t>(tickets & kMaxTasks));
        } catch (...) {
            std::lock_guard<std::mutex> one_error(error_mutex_);
            error_ = std::current_exception();
        }
        done_.fetch_add(1, std::memory_order_release);
        return true;
    }

    void work(int worker) {
        const StandardRounding rounding;
        for (;;) {
            const uint32_t seen = jobs_.load(std::memory_order_acquire);
            while (run_one(worker)) {
            }
            for (int spins = 0; spins < kSpins && jobs_.load(std::memory_order_relaxed) == seen; ++spins) _mm_pause();
            jobs_.wait(seen, std::memory_order_acquire);
        }
    }

    // Fewer threads than asked for, where the system gives no more, only make the job slower.
    void grow(int num_workers) {
        try {
            for (; num_workers_ < num_workers; ++num_workers_) {
                std::thread([this, worker = num_workers_ + 1] { work(worker); }).detach();
            }
        } catch (const std::system_error&) {
        }
    }

    std::mutex mutex_, error_mutex_;
    std::exception_ptr error_;
    std::atomic<uint64_t> tickets_{0};
    std::atomic<uint32_t> jobs_{0};
    std::atomic<int64_t> done_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
    int64_t num_tasks_ = 0;
    int num_workers_ = 0;
};

// Never destroyed: its threads may outlive the statics.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool* the_pool() {
    ThreadPool* current = pool.load(std::memory_order_acquire);
    if (current != nullptr) return current;
    static std::once_flag registered;
    // A forked child has none of the threads, and perhaps a locked mutex: it starts a pool of its own.
    std::call_once(registered,
                   [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); }); });
    auto* made = new ThreadPool;
    if (pool.compare_exchange_strong(current, made)) return made;
    delete made;
    return current;
}

}  // namespace

void run_tasks(int64_t num_tasks, int num_threads, Task task, void* context) {
    const StandardRounding rounding;
    num_threads = static_cast<int>(std::min<int64_t>(std::clamp(num_threads, 1, kMaxThreads), num_tasks));
    if (num_threads <= 1) {
        for (int64_t index = 0; index < num_tasks; ++index) task(context, index);
        return;
    }
    for (int64_t first = 0; first < num_tasks; first += kMaxTasks) {
        struct Slice {
            Task task;
            void* context;
            int64_t first;
        } slice{task, context, first};
        the_pool()->run(
            std::min(kMaxTasks, num_tasks - first), num_threads,
            [](void* s, int64_t index) {
                auto* part = static_cast<Slice*>(s);
                part->task(part->context, part->first + index);
            },
            &slice);
    }
}

}  // namespace llama_fast
