// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/barrier.cuh.
#pragma once

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

template <int kBarrier, int kThreads>
void named_barrier_sync(Here here = Here::now()) {
    static_assert(kBarrier > 0 && kBarrier < 16 && kThreads % 32 == 0);
    emulated_cuda::block_barrier(kBarrier, kThreads, 0, here);
}

inline void barrier_init(std::uint64_t* barrier, int arrivals, Here here = Here::now()) {
    emulated_cuda::barrier_init(barrier, arrivals, here);
}
inline void barrier_init_fence() {
    emulated_cuda::fence_barrier_init();
}
inline void fence_proxy_async() {
    emulated_cuda::fence_proxy_async();
}
inline void barrier_arrive(std::uint64_t* barrier, Here here = Here::now()) {
    emulated_cuda::barrier_arrive(barrier, 0, here);
}
inline void barrier_arrive_expecting(std::uint64_t* barrier, int bytes, Here here = Here::now()) {
    emulated_cuda::barrier_arrive(barrier, bytes, here);
}
inline void barrier_wait(std::uint64_t* barrier, int parity, Here here = Here::now()) {
    emulated_cuda::barrier_wait(barrier, parity, here);
}

}  // namespace pyfeat::cuda
