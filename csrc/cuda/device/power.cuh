// SPDX-License-Identifier: Apache-2.0
// Powers of two.
#pragma once

namespace pyfeat::cuda {

// 2^x, off by 2^-22 of it at most; 0 below 2^-126.
__device__ inline float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

}  // namespace pyfeat::cuda
