// SPDX-License-Identifier: Apache-2.0
// Functions that take turns on one thread of the operating system, each with a stack of its own.
#pragma once

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace emulated_cuda {

#ifdef __x86_64__
// Keeps the registers that a function must keep, and goes on where `to` was left.
extern "C" void emulated_cuda_switch(void** from, void* to);
#endif

class Fiber {
  public:
    static constexpr std::size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;

    Fiber() {
        void* memory = mmap(nullptr,
                            kGuardBytes + kStackBytes,
                            PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                            -1,
                            0);
        if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
            std::abort();
        }
        stack_ = static_cast<char*>(memory) + kGuardBytes;
    }
    ~Fiber() {
        munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
    }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Begins anew with function(), which must not return.
    void reset(void (*function)()) {
#ifdef __x86_64__
        auto** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 1;  // aligned as after a call
        *--top = reinterpret_cast<void*>(function);
        for (int i = 0; i < 6; ++i) {
            *--top = nullptr;
        }
        resume_ = top;
#else
        getcontext(&own_);
        own_.uc_stack.ss_sp = stack_;
        own_.uc_stack.ss_size = kStackBytes;
        own_.uc_link = nullptr;
        makecontext(&own_, function, 0);
#endif
    }

    // From the scheduler: runs until it pauses.
    void run() {
#ifdef __x86_64__
        emulated_cuda_switch(&scheduler_, resume_);
#else
        swapcontext(&scheduler_, &own_);
#endif
    }
    // From the fiber: back to the scheduler.
    void pause() {
#ifdef __x86_64__
        emulated_cuda_switch(&resume_, scheduler_);
#else
        swapcontext(&own_, &scheduler_);
#endif
    }

    bool holds(std::uintptr_t address) const {
        return address - reinterpret_cast<std::uintptr_t>(stack_) < kStackBytes;
    }

  private:
    char* stack_;
#ifdef __x86_64__
    void *resume_ = nullptr, *scheduler_ = nullptr;
#else
    ucontext_t own_{}, scheduler_{};
#endif
};

}  // namespace emulated_cuda
