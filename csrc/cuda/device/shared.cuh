// SPDX-License-Identifier: Apache-2.0
// Shared memory as instructions address it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyfeat::cuda {

// Dynamic shared memory of the thread block, 1024-byte aligned as swizzles of 128 bytes want it.
__device__ inline char* dynamic_shared() {
    extern __shared__ __align__(1024) char shared_bytes[];
    return shared_bytes;
}

// The 32-bit address in the window of shared memory.
__device__ inline std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace pyfeat::cuda
