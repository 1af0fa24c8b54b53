// SPDX-License-Identifier: Apache-2.0
// Exact nearest neighbours on an NVIDIA GPU. Kernels follow one another in the stream; the host
// waits for none of them.
#pragma once

#include <cstdint>
#include <utility>

#include "cuda/launch.hpp"
#include "cuda/similarity/packed_memory.hpp"
#include "cuda/similarity/search_state.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

// All pointers are to memory of the device.
struct PackCall {
    Rows memory;                  // [N, D]
    std::int64_t first, end;      // of the rows to pack
    const std::uint8_t* allowed;  // [N], not 0 where a row may be found; null: all may
    Metric metric;
    DeviceFrame frame;
    void* packed;  // packed_bytes(end - first, D), 256-byte aligned
};

struct KnnCall {
    Rows queries;             // [Q, D]
    Rows memory;              // [N, D]
    std::int64_t first, end;  // of the rows that are packed
    void* packed;
    Metric metric;
    PairMask mask;
    DeviceFrame frame;
    std::int64_t k;     // 1 to 64
    void* workspace;    // workspace_bytes(Q, D, k), 256-byte aligned, the same for all parts
    bool begins, ends;  // whether these are the first and the last rows that are searched
    NeighbourOutputs outputs;
    double bound_scale;  // of the error bounds; 1 but for tests that show what they are for
};

std::int64_t packed_bytes(std::int64_t num_rows, std::int64_t dim);
std::int64_t workspace_bytes(std::int64_t num_queries, std::int64_t dim, std::int64_t k);

// Where in the workspace the numbers of listed rows [Q] and of queries whose list is too short [1]
// lie.
std::pair<std::int64_t, std::int64_t> count_offsets(std::int64_t num_queries,
                                                    std::int64_t dim,
                                                    std::int64_t k);

void pack_memory(const PackCall& call, const Queue& queue);

// Searches a part of the memory; after the last part the outputs are written.
void knn(const KnnCall& call, const Queue& queue);

}  // namespace pyfeat::cuda
