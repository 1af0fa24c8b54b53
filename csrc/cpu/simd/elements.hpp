// SPDX-License-Identifier: Apache-2.0
// The dtypes of features, each converted to float64 without loss. In plain C++ without branches,
// so that the compiler can do several at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Float32 {
    float value;
    explicit operator double() const {
        return static_cast<double>(value);
    }
};

struct Float64 {
    double value;
    explicit operator double() const {
        return value;
    }
};

inline float float_from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

struct Bfloat16 {
    std::uint16_t bits;
    explicit operator double() const {
        return static_cast<double>(float_from_bits(static_cast<std::uint32_t>(bits) << 16));
    }
};

struct Float16 {
    std::uint16_t bits;
    explicit operator double() const {
        const std::uint32_t sign = (bits & 0x8000U) << 16, rest = (bits & 0x7FFFU) << 13;
        // Exponents differ by 112; the product also makes normal numbers of subnormal ones.
        const float scaled = float_from_bits(rest) * 0x1p112F;
        // Infinity and NaN have come out as numbers from 2^16 on.
        const std::uint32_t special = rest | 0x7F800000U;
        std::uint32_t magnitude;
        std::memcpy(&magnitude, &scaled, sizeof(magnitude));
        return static_cast<double>(
            float_from_bits(sign | (scaled < 0x1p16F ? magnitude : special)));
    }
};

}  // namespace
