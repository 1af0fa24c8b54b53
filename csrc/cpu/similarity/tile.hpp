// SPDX-License-Identifier: Apache-2.0
// float32 tiles: the product, and the comparison that decides what an epilogue looks at.
#pragma once

#include "cpu/similarity/simd.hpp"

namespace {

void tile_product(std::int64_t dim, const float* a, const float* b, float* products) {
    Floats sums[kTileQueries][kTileVectors];
    for (int r = 0; r < kTileQueries; ++r) {
        for (int v = 0; v < kTileVectors; ++v) {
            sums[r][v] = zero();
        }
    }
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
    for (int r = 0; r < kTileQueries; ++r) {
        for (int v = 0; v < kTileVectors; ++v) {
            store(products + r * kTileRows + v * kLanes, sums[r][v]);
        }
    }
}

bool mark_scores(float* products,
                 const float* row_terms,
                 const float* limits,
                 std::uint32_t* marks) {
    std::uint32_t any = 0;
    for (int r = 0; r < kTileQueries; ++r) {
        const Floats limit = broadcast(limits[r]);
        std::uint32_t mark = 0;
        for (int v = 0; v < kTileVectors; ++v) {
            float* at = products + r * kTileRows + v * kLanes;
            const Floats scores = subtract(load(row_terms + v * kLanes), load(at));
            store(at, scores);
            mark |= less_or_equal(scores, limit) << (v * kLanes);
        }
        marks[r] = mark;
        any |= mark;
    }
    return any != 0;
}

}  // namespace
