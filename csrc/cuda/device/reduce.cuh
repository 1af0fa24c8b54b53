// SPDX-License-Identifier: Apache-2.0
// Additions to global memory that return nothing, in no fixed order.
#pragma once

#include <cuda_runtime.h>

namespace pyfeat::cuda {

// red.global.add.v4.f32: four floats at 16 aligned bytes, each added on its own; below compute
// capability 9.0 one by one.
__device__ inline void reduce_add(float* at, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     __cvta_generic_to_global(at)),
                 "f"(x),
                 "f"(y),
                 "f"(z),
                 "f"(w)
                 : "memory");
#else
    atomicAdd(at, x);
    atomicAdd(at + 1, y);
    atomicAdd(at + 2, z);
    atomicAdd(at + 3, w);
#endif
}

}  // namespace pyfeat::cuda
