// SPDX-License-Identifier: Apache-2.0
// What is common to the tiles of every precision.
#pragma once

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/simd.hpp"

namespace {

inline void clear(Floats (&sums)[kTileQueries][kTileVectors]) {
    for (int r = 0; r < kTileQueries; ++r) {
        for (int v = 0; v < kTileVectors; ++v) {
            sums[r][v] = zero();
        }
    }
}

inline void store(float* products, const Floats (&sums)[kTileQueries][kTileVectors]) {
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

// Transforms a row, hands every value to keep(d, x), which stores it and returns what it stored,
// and measures the difference.
template <typename Keep>
inline pyfeat::PackedRow transform_row(const float* row,
                                       double row_scale,
                                       std::int64_t dim,
                                       const pyfeat::Transform& transform,
                                       Keep keep) {
    const double* mean = transform.mean;
    const double scale = transform.scale;
    pyfeat::PackedRow packed{0.0, 0.0, 0.0};
    for (std::int64_t d = 0; d < dim; ++d) {
        const double x = (static_cast<double>(row[d]) * row_scale - mean[d]) * scale;
        const double residual = x - static_cast<double>(keep(d, static_cast<float>(x)));
        packed.squared_norm += x * x;
        packed.squared_residual += residual * residual;
        packed.mean_product += x * (mean[d] * scale);
    }
    return packed;
}

}  // namespace
