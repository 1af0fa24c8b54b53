// SPDX-License-Identifier: Apache-2.0
// What kernels and their launchers take from the toolkit's header of this name.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "emulation.hpp"
#include "vector_types.hpp"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ dynamic_shared_of_cuda_device_shared_cuh_is_the_only_shared_memory

// Constant while a thread runs.
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

#include "intrinsics.hpp"
#include "runtime_api.hpp"
