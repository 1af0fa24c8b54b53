// SPDX-License-Identifier: Apache-2.0
// Floats of 16 bits, to the nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation.hpp"

namespace emulated_cuda {

inline std::uint16_t to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if (std::isnan(x)) {
        return 0x7FFF;
    }
    return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

inline float from_float16(std::uint16_t bits) {
    const int exponent = bits >> 10 & 0x1F, mantissa = bits & 0x3FF;
    float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    if (exponent == 0x1F) {
        size = mantissa == 0 ? HUGE_VALF : std::nanf("");
    }
    return (bits & 0x8000U) != 0 ? -size : size;
}

inline std::uint16_t to_float16(float x) {
    const auto sign = static_cast<std::uint16_t>(std::signbit(x) ? 0x8000 : 0);
    const float size = std::fabs(x);
    if (std::isnan(x)) {
        return 0x7FFF;
    }
    if (size >= 65520.0F) {
        return static_cast<std::uint16_t>(sign | 0x7C00);
    }
    int exponent = 0;
    std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
    exponent = size < 0x1p-14F ? -13 : exponent;
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    // units in [1024, 2048] unless subnormal; a carry moves into the exponent by itself.
    const int bits = size < 0x1p-14F ? units : ((exponent + 13) << 10) + units;
    return static_cast<std::uint16_t>(sign | bits);
}

}  // namespace emulated_cuda
