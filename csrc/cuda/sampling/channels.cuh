// SPDX-License-Identifier: Apache-2.0
// Channels of values and gradients, as many at a time as a thread reads at once: kWidth of type T,
// 16 bytes or one element, in registers as Real.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/convert.cuh"
#include "cuda/device/reduce.cuh"

namespace pyfeat::cuda {
namespace {

template <typename T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__device__ inline RealOf<T> to_real(T value) {
    if constexpr (sizeof(T) == 2) {
        return to_float(value);
    } else {
        return value;
    }
}

template <typename T>
__device__ inline T from_real(RealOf<T> value) {
    if constexpr (std::is_same_v<T, Bfloat16>) {
        return to_bfloat16(value);
    } else if constexpr (std::is_same_v<T, Float16>) {
        return to_float16(value);
    } else {
        return value;
    }
}

// As they lie in memory, converted where they are used.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Channels {
    T elements[kWidth];

    __device__ static Channels load(const T* at) {
        return *reinterpret_cast<const Channels*>(at);
    }
    __device__ void store(T* at) const {
        *reinterpret_cast<Channels*>(at) = *this;
    }
    __device__ RealOf<T> operator[](int i) const {
        return to_real(elements[i]);
    }
};

// Each rounded once.
template <typename T, int kWidth>
__device__ inline void store_channels(T* at, const RealOf<T> (&values)[kWidth]) {
    Channels<T, kWidth> rounded;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        rounded.elements[i] = from_real<T>(values[i]);
    }
    rounded.store(at);
}

// at[i] += values[i], in no fixed order with others.
template <int kWidth, typename Real>
__device__ inline void add_channels(Real* at, const Real (&values)[kWidth]) {
    if constexpr (kWidth == 1) {
        atomicAdd(at, values[0]);
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            reduce_add(at + i, values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
    }
}

}  // namespace
}  // namespace pyfeat::cuda
