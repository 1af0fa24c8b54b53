// SPDX-License-Identifier: Apache-2.0
// What a search knows of its queries, in one piece of device memory.
#pragma once

#include <cstdint>

#include "cuda/similarity/bounds.hpp"
#include "cuda/similarity/packed_memory.hpp"
#include "cuda/similarity/panels.hpp"
#include "host_device.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

// Neighbours that the kernels keep for each query.
constexpr std::int64_t kMostNeighbours = 64;

// Columns for which the bounds of products hold (bounds.hpp) and then some.
constexpr std::int64_t kMostColumns = std::int64_t{1} << 17;
// Slots are counted in 31 bits.
constexpr std::int64_t kMostPackedRows = std::int64_t{1} << 30;

// How many of the rows are sampled for the first threshold, and what is kept because of it.
//
// Of a sample of 1 / s of the rows, the k-th smallest upper bound is a threshold that about s k of
// all rows pass, a number with a standard deviation of s sqrt(k): at most 1024, and 178. Half of a
// list is left for what bounds let through besides, for k = 1 nearly all: clusters of rows that
// rounding does not tell apart. A list that overflows costs time only: all rows are ranked.
struct ShortlistSizes {
    std::int64_t sampling;  // s
    std::int64_t lanes;     // of the least upper bounds of groups of rows
};
constexpr ShortlistSizes shortlist_sizes(std::int64_t k) {
    return k < 32 ? ShortlistSizes{32, 256} : ShortlistSizes{16, 1024};
}
// Rows that the list of a query holds.
constexpr std::int64_t kListedRows = 2048;

struct Candidate {
    std::int32_t slot;
    float score;
};

// Q queries, filled up to whole panels of packed values.
struct SearchState {
    std::int64_t num_queries;
    std::int32_t num_blocks;
    std::int32_t k, lanes, capacity;
    std::uint16_t* values;      // [panels, blocks, 128, 64]
    QueryTerms* terms;          // [Q]
    double* factors;            // [Q], 1 / ||q|| for cosine, else 1
    float* thresholds;          // [Q], no less than the score of the k-th nearest row
    std::int32_t* lane_uppers;  // [Q, lanes], in the order of the floats
    std::int32_t* counts;       // [Q], rows that passed; those beyond the capacity are not listed
    Candidate* candidates;      // [Q, capacity]
    double* best_keys;          // [Q, k], nearest first; infinite where there is none
    std::int64_t* best_rows;    // [Q, k], kNoRow where there is none
    std::int32_t* overflowed;   // [Q], queries whose list is too short
    std::int32_t* locks;        // [Q], of the best of these
    long long* limits;          // [Q], their k-th best keys, in order (rank.cuh)
    std::int32_t* num_overflowed;  // [1]

    PYFEAT_HOST_DEVICE Panels panels() const {
        return {values, static_cast<std::int32_t>(ceil_div(num_queries, kPanelRows)), num_blocks};
    }
};

constexpr std::int64_t kNoRow = INT64_MAX;

inline SearchState carve_state(std::int64_t num_queries,
                               std::int64_t dim,
                               std::int64_t k,
                               Carver& carver) {
    const ShortlistSizes sizes = shortlist_sizes(k);
    const std::int64_t blocks = num_blocks_of(dim);
    SearchState state{};
    state.num_queries = num_queries;
    state.num_blocks = static_cast<std::int32_t>(blocks);
    state.k = static_cast<std::int32_t>(k);
    state.lanes = static_cast<std::int32_t>(sizes.lanes);
    state.capacity = static_cast<std::int32_t>(kListedRows);
    state.values = carver.take<std::uint16_t>(ceil_div(num_queries, kPanelRows) * kPanelRows *
                                              blocks * kBlockColumns);
    state.terms = carver.take<QueryTerms>(num_queries);
    state.factors = carver.take<double>(num_queries);
    state.thresholds = carver.take<float>(num_queries);
    state.lane_uppers = carver.take<std::int32_t>(num_queries * sizes.lanes);
    state.counts = carver.take<std::int32_t>(num_queries);
    state.candidates = carver.take<Candidate>(num_queries * kListedRows);
    state.best_keys = carver.take<double>(num_queries * k);
    state.best_rows = carver.take<std::int64_t>(num_queries * k);
    state.overflowed = carver.take<std::int32_t>(num_queries);
    state.locks = carver.take<std::int32_t>(num_queries);
    state.limits = carver.take<long long>(num_queries);
    state.num_overflowed = carver.take<std::int32_t>(1);
    return state;
}

// One mask for each query; one for all has gone into the packed memory.
struct PairMask {
    const std::uint8_t* data;   // [Q, N], not 0 where allowed; null: all are
    std::int64_t query_stride;  // from one query to the next

    PYFEAT_HOST_DEVICE bool allows(std::int64_t query, std::int64_t row) const {
        return data == nullptr || data[query * query_stride + row] != 0;
    }
};

struct NeighbourOutputs {
    void* distances;        // [Q, k], float32 or float64
    Dtype dtype;            // of distances
    std::int64_t* indices;  // [Q, k], -1 where there is none
};

}  // namespace pyfeat::cuda
