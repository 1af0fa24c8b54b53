// SPDX-License-Identifier: Apache-2.0
// What each op reads and writes. Strides are in elements; the last axis is contiguous.
#pragma once

#include <cstdint>

namespace pyfeat {

enum class Metric : std::int32_t { kEuclidean, kSquaredEuclidean, kCosine, kInnerProduct };

// A matrix of features that the op only reads.
struct Rows {
    const float* data;  // [num_rows, dim]
    std::int64_t num_rows;
    std::int64_t dim;     // D
    std::int64_t stride;  // from one row to the next

    const float* row(std::int64_t index) const {
        return data + index * stride;
    }
};

struct KnnParams {
    Rows queries;    // [Q, D]
    Rows memory;     // [N, D]
    std::int64_t k;  // 1 <= k <= N
    Metric metric;
    float* distances;       // [Q, k], contiguous
    std::int64_t* indices;  // [Q, k], contiguous
};

// Counts of one search, for tests and benchmarks.
struct KnnCounters {
    std::int64_t reranked = 0;    // rows whose distance was taken in float64
    std::int64_t exhaustive = 0;  // queries whose shortlist overflowed: every row in float64
};

struct FarthestParams {
    Rows rows;                  // [N, D]
    double* squared_distances;  // [N], to the nearest pick; infinity before the first, -1 for picks
    std::int32_t* owners;       // [N], which pick that is, as a position in `picks`
    std::int64_t* picks;        // [first_pick + num_picks]; the first first_pick + 1 are set
    double* squared_radii;      // the same; largest of squared_distances after each pick
    std::int64_t first_pick;    // picks that squared_distances and owners know already
    std::int64_t num_picks;
    double stop_squared_radius;  // ends early once the largest distance is at or below this
};

}  // namespace pyfeat
