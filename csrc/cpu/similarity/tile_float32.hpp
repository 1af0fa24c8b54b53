// SPDX-License-Identifier: Apache-2.0
// float32 tiles: panels [D, width] of floats.
#pragma once

#include "cpu/similarity/tile.hpp"

namespace {

constexpr int kPackedValues = 1;

void tile_product(std::int64_t dim, const float* a, const float* b, float* products) {
    Floats sums[kTileQueries][kTileVectors];
    clear(sums);
    for (std::int64_t d = 0; d < dim; ++d) {
        Floats rows[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) {
            rows[v] = load(b + v * kLanes);
        }
        for (int r = 0; r < kTileQueries; ++r) {
            const Floats query = broadcast(a[r]);
            for (int v = 0; v < kTileVectors; ++v) {
                sums[r][v] = multiply_add(query, rows[v], sums[r][v]);
            }
        }
        a += kTileQueries;
        b += kTileRows;
    }
    store(products, sums);
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
