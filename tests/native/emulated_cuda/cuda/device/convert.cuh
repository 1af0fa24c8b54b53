// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/convert.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "half_floats.hpp"

namespace pyfeat::cuda {

struct Float16 {
    std::uint16_t bits;
};
struct Bfloat16 {
    std::uint16_t bits;
};

inline float to_float(Bfloat16 value) {
    return emulated_cuda::from_bf16(value.bits);
}
inline float to_float(Float16 value) {
    return emulated_cuda::from_float16(value.bits);
}
inline Bfloat16 to_bfloat16(float value) {
    return {emulated_cuda::to_bfloat16(value)};
}
inline Float16 to_float16(float value) {
    return {emulated_cuda::to_float16(value)};
}

}  // namespace pyfeat::cuda
