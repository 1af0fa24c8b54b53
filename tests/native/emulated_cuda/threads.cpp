// SPDX-License-Identifier: Apache-2.0
// Blocks, threads that take turns, and what they wait for.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "state.hpp"

#ifdef __x86_64__
asm(R"(
.text
.hidden emulated_cuda_switch
.globl emulated_cuda_switch
.type emulated_cuda_switch, @function
emulated_cuda_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_cuda_switch, .-emulated_cuda_switch
)");
#endif

// As kernels see them; not const here.
struct uint3 {
    unsigned x, y, z;
};
uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {
namespace {

void (*body)(void*);
void* body_arguments;

void run_body() {
    Thread& thread = *block().current;
    body(body_arguments);
    if (!thread.products.empty()) {
        fail(thread.here, "a thread ends before its warpgroup's products have been waited for");
    }
    thread.state = State::kDone;
    ++block().progress;
    thread.fiber.pause();
    __builtin_unreachable();
}

std::string place_of(const Thread& thread) {
    const char* slash = std::strrchr(thread.here.file, '/');
    return std::string(thread.waits_for) + " (" + (slash ? slash + 1 : thread.here.file) + ":" +
           std::to_string(thread.here.line) + ")";
}

// Nobody can go on: says how many threads wait for what.
void report_deadlock() {
    std::map<std::string, int> waiting;
    for (int t = 0; t < block().num_threads; ++t) {
        const Thread& thread = *block().threads[static_cast<std::size_t>(t)];
        ++waiting[thread.state == State::kDone ? "ended" : place_of(thread)];
    }
    std::string& error = block().error = "threads wait for each other:";
    for (const auto& [what, count] : waiting) {
        error += " " + std::to_string(count) + " at " + what + ";";
    }
}

void begin_block(Grid position, Grid size, std::size_t shared_bytes) {
    Block& b = block();
    b.error.clear();
    b.error_code = nullptr;
    b.performs = false;
    b.idle_rounds_allowed = 0;
    b.shared_bytes = shared_bytes;
    std::memset(b.shared, 0xFF, kSharedWindow);  // NaN
    for (auto* cells : {&b.written, &b.read_first, &b.read_last}) {
        cells->assign(shared_bytes, 0);
    }
    b.barriers.clear();
    b.products.assign(static_cast<std::size_t>((b.num_threads + 127) / 128), {});
    b.fenced_memory = false;
    b.acquired.clear();
    blockIdx = {position.x, position.y, position.z};
    blockDim = {size.x, size.y, size.z};
    const auto count = static_cast<std::size_t>(b.num_threads);
    for (std::size_t t = 0; t < count; ++t) {
        if (t == b.threads.size()) {
            b.threads.push_back(std::make_unique<Thread>());
        }
        Thread& thread = *b.threads[t];
        thread.index = static_cast<int>(t);
        const auto i = static_cast<unsigned>(t);
        thread.position[0] = i % size.x;
        thread.position[1] = i / size.x % size.y;
        thread.position[2] = i / size.x / size.y;
        thread.state = State::kReady;
        thread.here = {"", 0};
        thread.clock.assign(count, 0);
        thread.fenced.assign(count, 0);
        thread.fence_count = 0;
        thread.publish();
        thread.copies.clear();
        thread.copy_groups.clear();
        thread.warpgroup_fenced = false;
        thread.multiplied = thread.waited = 0;
        thread.product_groups.clear();
        thread.products.clear();
        thread.mask = 0;
        thread.barrier = -1;
        thread.fiber.reset(run_body);
    }
}

void run_block() {
    Block& b = block();
    for (bool alive = true; alive && b.error.empty();) {
        alive = false;
        const std::uint64_t before = b.progress;
        for (int i = 0; i < b.num_threads && b.error.empty(); ++i) {
            const int t = device().backwards ? b.num_threads - 1 - i : i;
            Thread& thread = *b.threads[static_cast<std::size_t>(t)];
            if (thread.state == State::kReady) {
                b.current = &thread;
                threadIdx = {thread.position[0], thread.position[1], thread.position[2]};
                thread.fiber.run();
                b.current = nullptr;
            }
            alive |= thread.state != State::kDone;
        }
        if (b.progress != before) {
            b.idle_rounds_allowed = 0;
        } else if (alive && b.error.empty() && --b.idle_rounds_allowed < 0) {
            report_deadlock();
        }
    }
}

}  // namespace

Device& device() {
    static Device the_device;
    return the_device;
}

Block& block() {
    static Block the_block;
    return the_block;
}

void fail(Here here, const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    Thread& thread = *block().current;
    thread.here = here;
    thread.waits_for = text;
    block().error = "thread " + std::to_string(thread.index) + ": ";
    if (is_hooked(here)) {
        block().error += text;
        block().error_code = hooked_code();
    } else {
        block().error += place_of(thread);
    }
    thread.fiber.pause();
    __builtin_unreachable();
}

void pause(const char* waits_for, Here here) {
    Thread& thread = *block().current;
    thread.waits_for = waits_for;
    thread.here = here;
    thread.fiber.pause();
}

void let_others_run(const char* what, Here here) {
    constexpr int kRounds = 10000;
    if (block().idle_rounds_allowed == 0) {
        block().idle_rounds_allowed = kRounds;
    }
    pause(what, here);
}

void launch(Grid grid,
            Grid size,
            std::size_t shared_bytes,
            const void* kernel,
            void (*function)(void*),
            void* arguments,
            std::size_t argument_bytes) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    Block& b = block();
    if (b.shared == nullptr) {
        b.shared = static_cast<char*>(mmap(
            nullptr, kSharedWindow, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
    body = function;
    body_arguments = arguments;
    b.num_threads = static_cast<int>(size.x * size.y * size.z);
    gridDim = {grid.x, grid.y, grid.z};
    begin_grid(arguments, argument_bytes);
    const std::int64_t blocks = static_cast<std::int64_t>(grid.x) * grid.y * grid.z;
    for (std::int64_t i = 0; i < blocks; ++i) {
        const std::int64_t index = device().backwards ? blocks - 1 - i : i;
        b.ordinal = index + 1;
        const auto x = static_cast<unsigned>(index % grid.x);
        const auto y = static_cast<unsigned>(index / grid.x % grid.y);
        const auto z = static_cast<unsigned>(index / grid.x / grid.y);
        begin_block({x, y, z}, size, shared_bytes);
        run_block();
        if (!b.error.empty()) {
            std::string error = "block (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
                                std::to_string(z) + "), " + b.error;
            if (b.error_code != nullptr) {
                error += " (" + place_of(b.error_code) + ")";
            }
            throw std::logic_error(error + ", in " + place_of(kernel));
        }
    }
}

char* shared_memory() {
    return block().shared;
}

int lane() {
    return block().current->index % kWarp;
}

int warp() {
    return block().current->index / kWarp;
}

int block_barrier(int barrier, int count, int value, Here here) {
    Block& b = block();
    Thread& thread = *b.current;
    const int wanted = count == 0 ? b.num_threads : count;
    thread.barrier = barrier;
    thread.barrier_value = value;
    thread.state = State::kWaiting;
    std::vector<Thread*> there;
    int sum = 0;
    for (int t = 0; t < b.num_threads; ++t) {
        Thread& other = *b.threads[static_cast<std::size_t>(t)];
        if (other.state == State::kWaiting && other.barrier == barrier) {
            there.push_back(&other);
            sum += other.barrier_value;
        }
    }
    if (static_cast<int>(there.size()) < wanted) {
        pause(barrier == 0 ? "a barrier of the block" : "a named barrier", here);
        return thread.barrier_value;
    }
    Clock seen = thread.clock;
    for (const Thread* other : there) {
        join(seen, other->clock);
    }
    for (Thread* other : there) {
        other->clock = seen;
        other->publish();
        other->barrier = -1;
        other->barrier_value = sum;
        other->state = State::kReady;
    }
    ++b.progress;
    return sum;
}

void warp_together(
    std::uint32_t mask, const char* what, Perform perform, void* operand, Here here) {
    Block& b = block();
    Thread& thread = *b.current;
    const int first = thread.index / kWarp * kWarp;
    if ((mask >> (thread.index % kWarp) & 1U) == 0) {
        fail(here, "%s without the calling lane in its mask %08x", what, mask);
    }
    thread.mask = mask;
    thread.perform = perform;
    thread.operand = operand;
    thread.waits_for = what;
    thread.here = here;
    void* operands[kWarp] = {};
    bool complete = true;
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((mask >> lane & 1U) == 0) {
            continue;
        }
        if (first + lane >= b.num_threads) {
            fail(here, "%s with lanes that the block does not have in mask %08x", what, mask);
        }
        const Thread& other = *b.threads[static_cast<std::size_t>(first + lane)];
        if (other.state == State::kDone) {
            fail(here, "%s, which lane %d has left without", what, lane);
        }
        if (other.mask == 0) {
            complete = false;
        } else if (other.perform != perform || other.mask != mask) {
            fail(here, "%s, while lane %d is at %s", what, lane, place_of(other).c_str());
        }
        operands[lane] = other.operand;
    }
    if (!complete) {
        thread.state = State::kWaiting;
        pause(what, here);
        return;
    }
    b.performs = true;
    perform(mask, operands);
    b.performs = false;
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((mask >> lane & 1U) != 0) {
            Thread& other = *b.threads[static_cast<std::size_t>(first + lane)];
            other.mask = 0;
            other.state = State::kReady;
        }
    }
    ++b.progress;
}

void warp_barrier(std::uint32_t mask, Here here) {
    warp_together(
        mask,
        "a barrier of the warp",
        [](std::uint32_t lanes, void* const* operands) {
            const auto clock_of = [&](int lane) -> Thread& {
                return *static_cast<Thread*>(operands[lane]);
            };
            Clock seen(clock_of(__builtin_ctz(lanes)).clock);
            for (int lane = 0; lane < kWarp; ++lane) {
                if ((lanes >> lane & 1U) != 0) {
                    join(seen, clock_of(lane).clock);
                }
            }
            for (int lane = 0; lane < kWarp; ++lane) {
                if ((lanes >> lane & 1U) != 0) {
                    clock_of(lane).clock = seen;
                    clock_of(lane).publish();
                }
            }
        },
        block().current,
        here);
}

}  // namespace emulated_cuda

// For Python.
extern "C" __attribute__((visibility("default"))) void emulated_cuda_allow(const void* address,
                                                                           std::size_t bytes) {
    emulated_cuda::allow(address, bytes);
}
extern "C" __attribute__((visibility("default"))) void emulated_cuda_forget_all() {
    emulated_cuda::forget_all();
}
extern "C" __attribute__((visibility("default"))) void emulated_cuda_set_device(int capability,
                                                                                int multiprocessors,
                                                                                int backwards) {
    emulated_cuda::device() = {capability, multiprocessors, 13000, backwards};
}
