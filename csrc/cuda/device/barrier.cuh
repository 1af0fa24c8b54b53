// SPDX-License-Identifier: Apache-2.0
// Barriers of some of the threads of a block, and barriers in shared memory (mbarrier, from compute
// capability 9.0 on) that also count bytes of copies.
#pragma once

#include <cstdint>

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

// Waits until kThreads threads, whole warps, have come to barrier kBarrier (1 to 15).
template <int kBarrier, int kThreads>
__device__ inline void named_barrier_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// A phase ends when `arrivals` threads have arrived and all expected bytes have been copied. By one
// thread, before barrier_init_fence and a barrier of the block.
__device__ inline void barrier_init(std::uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

// Barriers that this thread has made are seen by the copy engine.
__device__ inline void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                     : "memory");
}

// What this thread has written to shared memory, or seen written, may be read by products of
// warpgroups and by the copy engine.
__device__ inline void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(std::uint64_t* barrier) {
    asm volatile(
        "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
        : "memory");
}

// Arrives, and lets the phase wait for so many bytes of copies more.
__device__ inline void barrier_arrive_expecting(std::uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity has ended: 0 for the first one. Before any has ended, those
// of parity 1 count as ended.
__device__ inline void barrier_wait(std::uint64_t* barrier, int parity) {
    asm volatile(
        "{\n\t"
        ".reg .pred done;\n\t"
        "wait_%=:\n\t"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra wait_%=;\n\t"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

}  // namespace pyfeat::cuda
