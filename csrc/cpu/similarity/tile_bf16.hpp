// SPDX-License-Identifier: Apache-2.0
// bfloat16 tiles: panels [(D + 1) / 2, width] of pairs, features 2 i and 2 i + 1 in one word.
// One instruction multiplies both and adds them to a float32 sum: twice the rate of float32.
#pragma once

#include <cstring>

#include "cpu/similarity/tile.hpp"

namespace {

constexpr int kPackedValues = 2;

// Products of bfloat16 are exact in float32, so every feature costs one rounding, as in float32
// tiles. The instruction flushes subnormal numbers; the error bound allows for that.
inline Floats accumulate_pairs(Floats query, Floats rows, Floats sum) {
    return _mm512_dpbf16_ps(
        sum, reinterpret_cast<__m512bh>(query), reinterpret_cast<__m512bh>(rows));
}

void tile_product(std::int64_t dim, const float* a, const float* b, float* products) {
    multiply_panels<accumulate_pairs>((dim + 1) / 2, a, b, products);
}

pyfeat::PackedRow pack_row(const float* row,
                           double row_scale,
                           std::int64_t dim,
                           const pyfeat::Transform& transform,
                           float* panel,
                           int width,
                           int lane) {
    return transform_row(
        row,
        row_scale,
        dim,
        transform,
        [](float* values) {
            std::uint32_t bits[kSums];
            std::memcpy(bits, values, sizeof(bits));
            for (std::uint32_t& word : bits) {
                word += 0x7FFFU + ((word >> 16) & 1U);  // to nearest, ties to even
                word &= 0xFFFF0000U;
            }
            std::memcpy(values, bits, sizeof(bits));
        },
        [=](std::int64_t first, const float* values) {
            std::uint32_t bits[kSums];
            std::memcpy(bits, values, sizeof(bits));
            const std::int64_t count = dim - first < kSums ? dim - first : kSums;
            for (std::int64_t i = 0; i < count; i += 2) {
                const std::uint32_t pair = (bits[i] >> 16) | bits[i + 1];
                std::memcpy(panel + (first + i) / 2 * width + lane, &pair, sizeof(pair));
            }
        });
}

}  // namespace
