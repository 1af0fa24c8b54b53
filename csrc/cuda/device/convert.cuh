// SPDX-License-Identifier: Apache-2.0
// Floats of 16 bits, which are held as their bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyfeat::cuda {

struct Float16 {
    std::uint16_t bits;
};
struct Bfloat16 {
    std::uint16_t bits;
};

// Exact.
__device__ inline float to_float(Bfloat16 value) {
    return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
// cvt.f32.f16: exact.
__device__ inline float to_float(Float16 value) {
    float to;
    asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(value.bits));
    return to;
}

// cvt.rn.bf16.f32: to the nearest, ties to even.
__device__ inline Bfloat16 to_bfloat16(float value) {
    Bfloat16 to;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
    return to;
}
// cvt.rn.f16.f32: likewise, to infinity beyond 65,520.
__device__ inline Float16 to_float16(float value) {
    Float16 to;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
    return to;
}

}  // namespace pyfeat::cuda
