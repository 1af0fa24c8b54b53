// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/power.cuh.
#pragma once

#include <cmath>

namespace pyfeat::cuda {

inline float power_of_two(float x) {
    const float power = std::exp2(x);
    return power < 0x1p-126F ? 0.0F : power;
}

}  // namespace pyfeat::cuda
