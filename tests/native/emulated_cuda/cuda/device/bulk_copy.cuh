// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/bulk_copy.cuh.
#pragma once

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

inline void bulk_copy(
    void* shared, const void* global, int bytes, std::uint64_t* barrier, Here here = Here::now()) {
    emulated_cuda::bulk_copy(shared, global, bytes, barrier, here);
}

}  // namespace pyfeat::cuda
