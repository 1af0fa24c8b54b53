// SPDX-License-Identifier: Apache-2.0
// What is common to the tiles of every precision.
#pragma once

#include "cpu/similarity/distances.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/simd.hpp"

namespace {

// products = sum over words of accumulate(query word, row words, sum), all sums in registers.
template <Floats (*accumulate)(Floats query, Floats rows, Floats sum)>
inline void multiply_panels(std::int64_t words, const float* a, const float* b, float* products) {
    Floats sums[kTileQueries][kTileVectors];
    for (int r = 0; r < kTileQueries; ++r) {
        for (int v = 0; v < kTileVectors; ++v) {
            sums[r][v] = zero();
        }
    }
    for (std::int64_t w = 0; w < words; ++w) {
        Floats rows[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) {
            rows[v] = load(b + v * kLanes);
        }
        for (int r = 0; r < kTileQueries; ++r) {
            const Floats query = broadcast(a[r]);
            for (int v = 0; v < kTileVectors; ++v) {
                sums[r][v] = accumulate(query, rows[v], sums[r][v]);
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

// Transforms a row in blocks: round(values) rounds the values of a block in place to what is
// stored, put(d, values) stores them from feature d on, and the difference is measured. The last
// block is filled up with zeros, of which put must store no more than the panel has room for.
template <typename Round, typename Put>
inline pyfeat::PackedRow transform_row(const float* row,
                                       double row_scale,
                                       std::int64_t dim,
                                       const pyfeat::Transform& transform,
                                       Round round,
                                       Put put) {
    const double* mean = transform.mean;
    const double scale = transform.scale;
    PartialSums norm, residual, product;
    const auto block = [&](std::int64_t first, int count) {
        float values[kSums] = {};
        double exact[kSums] = {};
        for (int i = 0; i < count; ++i) {
            exact[i] = (static_cast<double>(row[first + i]) * row_scale - mean[first + i]) * scale;
            values[i] = static_cast<float>(exact[i]);
            norm.at[i] += exact[i] * exact[i];
            product.at[i] += exact[i] * (mean[first + i] * scale);
        }
        round(values);
        for (int i = 0; i < kSums; ++i) {
            const double lost = exact[i] - static_cast<double>(values[i]);
            residual.at[i] += lost * lost;
        }
        put(first, values);
    };
    const std::int64_t whole = dim - dim % kSums;
    for (std::int64_t d = 0; d < whole; d += kSums) {
        block(d, kSums);
    }
    if (whole < dim) {
        block(whole, static_cast<int>(dim - whole));
    }
    return {norm.total(), residual.total(), product.total()};
}

}  // namespace
