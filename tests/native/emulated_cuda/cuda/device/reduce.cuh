// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/reduce.cuh.
#pragma once

#include <cuda_runtime.h>

namespace pyfeat::cuda {

inline void reduce_add(float* at, float x, float y, float z, float w, Here here = Here::now()) {
    if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0) {
        emulated_cuda::fail(here, "additions of 16 bytes at an address that is no multiple of it");
    }
    atomicAdd(at, x, here);
    atomicAdd(at + 1, y, here);
    atomicAdd(at + 2, z, here);
    atomicAdd(at + 3, w, here);
}

}  // namespace pyfeat::cuda
