// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/shared.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyfeat::cuda {

inline char* dynamic_shared() {
    return emulated_cuda::shared_memory();
}

inline std::uint32_t shared_address(const void* pointer, Here here = Here::now()) {
    return emulated_cuda::shared_offset(pointer, here);
}

}  // namespace pyfeat::cuda
