// SPDX-License-Identifier: Apache-2.0
// Deformable attention as its kernels take it, by value. Strides are in elements.
#pragma once

#include <cstdint>

#include "params.hpp"
#include "sampling/levels.hpp"

namespace pyfeat::cuda {

// Real is the dtype of locations, weights and sums: double if values are, else float.
struct Sampling {
    std::int64_t num_queries, num_heads;  // Q, H
    std::int32_t num_cells, dim;          // S, D
    std::int32_t num_points;              // T

    const void* value;  // [B, S, H, D]
    std::int64_t batch_stride, head_stride;
    std::int32_t cell_bytes;  // from one cell to the next

    const void* locations;             // [B, Q, H, T, n], x first, [T, n] contiguous
    std::int64_t location_strides[3];  // of B, Q, H
    const void* weights;               // [B, Q, H, T]
    std::int64_t weight_strides[3];

    SamplingModes modes;
    Levels levels;
};

// How the queries of a head of a batch are cut into blocks of threads.
struct QueryBlocks {
    std::int32_t team;         // threads of one query
    std::int32_t num_queries;  // of a block
    std::int64_t count;
    // Neighbours sample the same cells, which the first-level cache then holds: where queries are
    // the cells of levels, a block takes a box of them, else a range of queries.
    bool tiled;
    QueryTile tile;
};

}  // namespace pyfeat::cuda
