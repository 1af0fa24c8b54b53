// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/copy_async.cuh.
#pragma once

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

inline void copy_async_16(void* shared, const void* global, Here here = Here::now()) {
    emulated_cuda::copy_async(shared, global, 16, 16, here);
}
inline void copy_async_commit() {
    emulated_cuda::copy_async_commit();
}
template <int kPending>
void copy_async_wait(Here here = Here::now()) {
    emulated_cuda::copy_async_wait(kPending, here);
}

}  // namespace pyfeat::cuda
