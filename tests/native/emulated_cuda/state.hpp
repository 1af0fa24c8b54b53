// SPDX-License-Identifier: Apache-2.0
// The thread block that is running, and what each of its threads knows of the others.
//
// Clocks: thread t counts up whenever it publishes what it did. An access is remembered as its
// thread and that thread's count, an epoch; a thread has seen it once its clock of t is not behind.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "emulation.hpp"
#include "fibers.hpp"

namespace emulated_cuda {

constexpr int kMaxThreads = 1024;
constexpr std::size_t kMaxSharedBytes = 227 << 10, kSharedWindow = 256 << 10;

using Clock = std::vector<std::uint32_t>;  // [threads of the block]
using Epoch = std::uint32_t;               // thread 10 bits, kinds 2 bits, count 20 bits

constexpr Epoch kAtomic = 1U << 20, kAsynchronous = 1U << 21, kCount = kAtomic - 1;
constexpr Epoch kInFlight = ~0U;  // a copy that nobody has waited for
inline int thread_of(Epoch epoch) {
    return static_cast<int>(epoch >> 22);
}

inline void join(Clock& clock, const Clock& other) {
    for (std::size_t i = 0; i < clock.size(); ++i) {
        clock[i] = clock[i] < other[i] ? other[i] : clock[i];
    }
}

struct Copy {
    std::size_t offset;  // in shared memory
    const void* global;
    std::size_t bytes, source_bytes;
};

enum class State { kReady, kWaiting, kDone };

struct Thread {
    Fiber fiber;
    int index = 0;
    unsigned position[3] = {};
    State state = State::kDone;
    const char* waits_for = "";
    Here here{"", 0};
    Clock clock, fenced;            // seen, and seen at the latest proxy fence
    std::uint32_t fence_count = 0;  // its own count then

    // A warp together
    std::uint32_t mask = 0;
    Perform perform = nullptr;
    void* operand = nullptr;
    // A barrier of the block
    int barrier = -1, barrier_value = 0;

    std::vector<Copy> copies;  // not committed
    std::vector<std::vector<Copy>> copy_groups;

    bool warpgroup_fenced = false;
    int multiplied = 0, waited = 0;                 // products, counted
    std::vector<int> product_groups;                // ends
    std::map<float*, std::vector<float>> products;  // what registers will be

    bool has_seen(Epoch epoch) const {
        return (epoch & kCount) <= clock[static_cast<std::size_t>(thread_of(epoch))];
    }
    Epoch epoch() const {
        return static_cast<Epoch>(index) << 22 | (clock[static_cast<std::size_t>(index)] & kCount);
    }
    void publish() {
        ++clock[static_cast<std::size_t>(index)];
    }
};

struct Barrier {
    int arrivals = 0, missing = 0, phase = 0;
    std::int64_t missing_bytes = 0;
    bool fenced = false;
    int maker = 0;
    Clock pending, completed;
    struct Bulk {
        Copy copy;
        int thread;
        std::uint32_t count;
    };
    std::vector<Bulk> copies;
};

struct Product {
    int columns;
    std::uint64_t a, b;
    bool accumulate;
    int threads_left;
    std::vector<float> a_values,
        b_values;  // [64, 16], [columns, 16], from the first to the last wait
};

struct Block {
    std::vector<std::unique_ptr<Thread>> threads;  // kept between launches
    int num_threads = 0;
    std::int64_t ordinal = 0;  // in the grid, from 1
    Thread* current = nullptr;
    bool performs = false;  // what a warp does together: accesses are those of hardware
    std::uint64_t progress = 0;
    int idle_rounds_allowed = 0;  // of threads that ask again and again
    std::string error;
    const void* error_code = nullptr;  // where, if the error does not say

    char* shared = nullptr;  // the window
    std::size_t shared_bytes = 0;
    std::vector<Epoch> written, read_first, read_last;  // of each byte of it

    std::map<std::size_t, Barrier> barriers;     // by offset
    std::vector<std::vector<Product>> products;  // of each warpgroup, in order
    bool fenced_memory = false;
    std::set<std::int64_t> acquired;  // other blocks whose writes are seen
};
Block& block();

// Back to the scheduler, until somebody makes this thread ready again.
void pause(const char* waits_for, Here here);

// Function, file and line of code, and of the latest access that a hook has seen.
std::string place_of(const void* code);
const void* hooked_code();
bool is_hooked(Here here);  // from there, without a line of its own

// What memory.cpp keeps of buffers.
void begin_grid(const void* arguments, std::size_t argument_bytes);
// A copy into shared memory begins and ends.
void take_off(const Copy& copy, Here here);
void land(const Copy& copy, Epoch epoch);

}  // namespace emulated_cuda
