// SPDX-License-Identifier: Apache-2.0
#include "cpu/threads.hpp"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#if defined(PYFEAT_X86)
#include <xmmintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace pyfeat {
namespace {

constexpr auto kPollInterval = std::chrono::milliseconds(50);

// The error bounds and the float64 distances assume gradual underflow. torch.set_flush_denormal
// turns it off for the calling thread, so it is turned on for the length of a task.
class GradualUnderflow {
  public:
#if defined(PYFEAT_X86)
    GradualUnderflow() : saved_(_mm_getcsr()) {
        constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
        _mm_setcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero));
    }
    ~GradualUnderflow() {
        _mm_setcsr(saved_);
    }
    GradualUnderflow(const GradualUnderflow&) = delete;
    GradualUnderflow& operator=(const GradualUnderflow&) = delete;

  private:
    unsigned saved_;
#else
    GradualUnderflow() {}
#endif
};

// The OpenMP runtime that the process has loaded, as torch does: its threads wait for work without
// sleeping for a while after each operation, so that threads of another pool would have to share
// cores with them. Found by name: nothing links to it.
class SharedRuntime {
  public:
    // Runs body(worker) for at most so many workers. False if there is no such runtime.
    bool run(int num_workers, const std::function<void(int)>& body) const {
        if (parallel_ == nullptr) {
            return false;
        }
        Call call{&body, {0}};
        parallel_(&enter, &call, static_cast<unsigned>(num_workers), 0);
        return true;
    }

    SharedRuntime() = default;
    explicit SharedRuntime(const char* name) {
#if defined(__unix__)
        parallel_ = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, name));
#else
        static_cast<void>(name);
#endif
    }

  private:
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    struct Call {
        const std::function<void(int)>* body;
        std::atomic<int> next;
    };

    static void enter(void* data) {
        auto& call = *static_cast<Call*>(data);
        (*call.body)(call.next.fetch_add(1, std::memory_order_relaxed));
    }

    Parallel parallel_ = nullptr;
};

class ThreadPool {
  public:
    // Runs body(worker) for every worker < num_workers; worker 0 is the caller. False if busy.
    bool run(int num_workers, const std::function<void(int)>& body) {
        std::unique_lock<std::mutex> exclusive(busy_, std::try_to_lock);
        if (!exclusive.owns_lock()) {
            return false;
        }
        while (static_cast<int>(threads_.size()) < num_workers - 1) {
            const int worker = static_cast<int>(threads_.size()) + 1;
            // generation_ changes only here, under busy_: a new thread waits for the next one.
            threads_.emplace_back([this, worker, seen = generation_] { serve(worker, seen); });
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            body_ = &body;
            num_workers_ = num_workers;
            pending_ = num_workers - 1;
            ++generation_;
        }
        wake_.notify_all();
        body(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
        return true;
    }

  private:
    void serve(int worker, std::uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (worker >= num_workers_) {
                continue;
            }
            const std::function<void(int)>* body = body_;
            lock.unlock();
            (*body)(worker);
            lock.lock();
            if (--pending_ == 0) {
                done_.notify_one();
            }
        }
    }

    std::mutex busy_;  // held for the length of one run
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* body_ = nullptr;
    int num_workers_ = 0;
    int pending_ = 0;
    std::uint64_t generation_ = 0;
};

// Whether this process began as a copy of another one. Threads do not survive that: the runtime
// would wait for ever for those that it had in the parent.
bool began_by_fork() {
#if defined(__linux__)
    constexpr unsigned kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC
    std::ifstream file("/proc/self/stat");
    std::string text;
    std::getline(file, text);
    // The name, in parentheses, may hold spaces; state, five ids and the flags follow.
    std::istringstream fields(text.substr(std::min(text.rfind(')'), text.size() - 1) + 1));
    std::string skipped;
    unsigned flags = kForkedWithoutExec;
    for (int i = 0; i < 6; ++i) {
        fields >> skipped;
    }
    return !(fields >> flags) || (flags & kForkedWithoutExec) != 0;
#else
    return true;
#endif
}

std::atomic<bool>& has_forked() {
    static std::atomic<bool> forked{began_by_fork()};
    return forked;
}

std::atomic<ThreadPool*>& current_pool() {
    // Never destroyed: its threads sleep until the process ends.
    static std::atomic<ThreadPool*> pool{new ThreadPool};
    return pool;
}

// From the moment that this library is loaded: its first call may come after a fork.
[[maybe_unused]] const bool watches_forks = [] {
    has_forked();
    current_pool();
#if defined(__unix__) || defined(__APPLE__)
    // Locks may be held for ever by threads that are gone: start afresh.
    pthread_atfork(nullptr, nullptr, [] {
        has_forked().store(true, std::memory_order_relaxed);
        current_pool().store(new ThreadPool);
    });
#endif
    return true;
}();

const SharedRuntime& shared_runtime() {
    static const SharedRuntime runtime("GOMP_parallel"), none;
    return has_forked().load(std::memory_order_relaxed) ? none : runtime;
}

}  // namespace

Execution::Execution(int num_threads, std::function<bool()> interrupted)
    : num_threads_(num_threads < 1 ? 1 : num_threads),
      interrupted_(std::move(interrupted)),
      owner_(std::this_thread::get_id()),
      next_poll_(std::chrono::steady_clock::now() + kPollInterval) {}

bool Execution::stop_requested() {
    if (stop_.load(std::memory_order_relaxed)) {
        return true;
    }
    if (interrupted_ && std::this_thread::get_id() == owner_) {
        const auto now = std::chrono::steady_clock::now();
        if (now >= next_poll_) {
            next_poll_ = now + kPollInterval;
            if (interrupted_()) {
                stop_.store(true, std::memory_order_relaxed);
                return true;
            }
        }
    }
    return false;
}

void Execution::parallel_for(std::int64_t num_tasks,
                             const std::function<void(std::int64_t, int)>& body) {
    if (num_tasks <= 0) {
        return;
    }
    std::atomic<std::int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;
    const std::function<void(int)> work = [&](int worker) {
        const GradualUnderflow scope;
        try {
            for (;;) {
                const std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
                if (task >= num_tasks || stop_requested()) {
                    return;
                }
                body(task, worker);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(error_mutex);
            if (!error) {
                error = std::current_exception();
            }
            next.store(num_tasks, std::memory_order_relaxed);
        }
    };
    const int workers = static_cast<int>(num_tasks < num_threads_ ? num_tasks : num_threads_);
    if (workers == 1 ||
        !(shared_runtime().run(workers, work) || current_pool().load()->run(workers, work))) {
        work(0);
    }
    if (error) {
        std::rethrow_exception(error);
    }
    if (stop_.load(std::memory_order_relaxed)) {
        throw Interrupted();
    }
}

}  // namespace pyfeat
