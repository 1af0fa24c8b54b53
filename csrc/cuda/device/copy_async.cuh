// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that a thread does not wait for until it says so.
#pragma once

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

// 16 bytes, both ends aligned; past the first-level cache.
__device__ inline void copy_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
}

// The copies since the last commit, if any, form a group.
__device__ inline void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are under way. Other threads see the
// bytes after a barrier.
template <int kPending>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace pyfeat::cuda
