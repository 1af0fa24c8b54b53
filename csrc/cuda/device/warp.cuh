// SPDX-License-Identifier: Apache-2.0
// Reductions over the 32 threads of a warp; all get the result, in the same bits.
#pragma once

#include <cuda_runtime.h>

namespace pyfeat::cuda {

constexpr unsigned kWholeWarp = 0xFFFFFFFFU;
constexpr int kWarpSize = 32;

template <typename T, typename Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(kWholeWarp, value, distance));
    }
    return value;
}

template <typename T>
__device__ T warp_sum(T value) {
    return warp_reduce(value, [](T x, T y) { return x + y; });
}

template <typename T>
__device__ T warp_max(T value) {
    return warp_reduce(value, [](T x, T y) { return x < y ? y : x; });
}

}  // namespace pyfeat::cuda
