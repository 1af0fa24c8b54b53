// SPDX-License-Identifier: Apache-2.0
// Loops over tasks on several threads: those of the OpenMP runtime that the process has loaded, or
// a small pool of our own. Linked, a second runtime beside that of torch, faiss or scikit-learn
// crashes or oversubscribes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <thread>

namespace pyfeat {

// Thrown on the calling thread after its `interrupted` callback has answered true.
struct Interrupted : std::runtime_error {
    Interrupted() : std::runtime_error("interrupted") {}
};

// How one call runs: on how many threads, and who may stop it.
class Execution {
  public:
    // `interrupted` is called on the constructing thread only, at most every 50 ms.
    Execution(int num_threads, std::function<bool()> interrupted);

    int num_threads() const {
        return num_threads_;
    }

    // Long loops ask between blocks of work and return early; parallel_for then throws.
    bool stop_requested();

    // Calls body(task, worker) for every task in [0, num_tasks), worker < num_threads(). Tasks are
    // handed out in order as workers become free; the calling thread is one of them. An exception
    // of `body` is rethrown here. While the pool of our own runs another thread's loop, the loop
    // runs on the calling thread alone.
    void parallel_for(std::int64_t num_tasks,
                      const std::function<void(std::int64_t task, int worker)>& body);

  private:
    int num_threads_;
    std::function<bool()> interrupted_;
    std::thread::id owner_;
    std::atomic<bool> stop_{false};
    std::chrono::steady_clock::time_point next_poll_;
};

}  // namespace pyfeat
