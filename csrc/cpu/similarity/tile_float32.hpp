// SPDX-License-Identifier: Apache-2.0
// float32 tiles: panels [D, width] of floats.
#pragma once

#include "cpu/similarity/tile.hpp"

namespace {

constexpr int kPackedValues = 1;

void tile_product(std::int64_t dim, const float* a, const float* b, float* products) {
    multiply_panels<multiply_add>(dim, a, b, products);
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
        [](float*) {},
        [=](std::int64_t first, const float* values) {
            const std::int64_t count = dim - first < kSums ? dim - first : kSums;
            for (std::int64_t i = 0; i < count; ++i) {
                panel[(first + i) * width + lane] = values[i];
            }
        });
}

}  // namespace
