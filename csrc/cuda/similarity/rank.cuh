// SPDX-License-Identifier: Apache-2.0
// The ranking that counts: distances by direct differences in float64, of the rows that the bounds
// leave, and of all rows where these are too many.
#pragma once

#include "cuda/device/shared.cuh"
#include "cuda/similarity/features.cuh"
#include "cuda/similarity/search_state.hpp"

namespace pyfeat::cuda {

constexpr int kRankWarps = 4;
constexpr int kRankThreads = 32 * kRankWarps;

// What distances are taken of.
template <typename Feature>
struct RankedRows {
    FeatureRows<Feature> queries;  // [Q, D]
    FeatureRows<Feature> memory;   // [N, D]
    Metric metric;
    PairMask mask;
};

// Rows and how near they are, in shared memory. Equal keys go to the lower row.
struct RankedList {
    double* keys;
    std::int64_t* rows;

    // A key that is NaN, from features whose products leave the range of float64, counts as
    // infinite.
    __device__ void set(int place, double key, std::int64_t row) const {
        keys[place] = key == key ? key : static_cast<double>(infinity());
        rows[place] = row;
    }
    __device__ bool precedes(int a, int b) const {
        if (keys[a] != keys[b]) {
            return keys[a] < keys[b];
        }
        return rows[a] < rows[b] || (rows[a] == rows[b] && a < b);
    }
};

// Whole numbers in the order of keys.
constexpr long long kNoLimit = INT64_MAX;
PYFEAT_HOST_DEVICE inline long long ordered_key(double key) {
    const auto bits = bits_as<long long>(key);
    return bits ^ ((bits >> 63) & kNoLimit);
}

// The k-th smallest of `count` whole numbers in shared memory, by bisection, by every warp for
// itself.
__device__ inline std::int32_t kth_smallest(const std::int32_t* values,
                                            int count,
                                            int k,
                                            int lane) {
    std::int32_t low = INT32_MIN, high = INT32_MAX;
    while (low < high) {
        // The mean, rounded down, without overflow.
        const std::int32_t middle = (low & high) + ((low ^ high) >> 1);
        int within = 0;
        for (int i = lane; i < count; i += 32) {
            within += values[i] <= middle;
        }
        if (warp_sum(within) >= k) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return high;
}

// Puts the k nearest of `count` rows in order, by counting how many precede each. All threads of
// the block; `count` is at least k.
__device__ inline void write_nearest(const RankedList& list,
                                     int count,
                                     const SearchState& state,
                                     std::int64_t query) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kRankThreads) {
        int rank = 0;
        for (int j = 0; j < count && rank < state.k; ++j) {
            rank += list.precedes(j, i);
        }
        if (rank < state.k) {
            state.best_keys[query * state.k + rank] = list.keys[i];
            state.best_rows[query * state.k + rank] = list.rows[i];
        }
    }
}

// Threshold of every query, from the lanes; a warp each. Nothing is listed yet.
static __global__ void __launch_bounds__(kRankThreads) threshold_kernel(SearchState state) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t query = static_cast<std::int64_t>(blockIdx.x) * kRankWarps + warp;
    if (query == 0 && lane == 0) {
        *state.num_overflowed = 0;
    }
    if (query >= state.num_queries) {
        return;
    }
    auto* uppers = reinterpret_cast<std::int32_t*>(dynamic_shared()) + warp * state.lanes;
    for (int i = lane; i < state.lanes; i += 32) {
        uppers[i] = state.lane_uppers[query * state.lanes + i];
    }
    __syncwarp();
    const std::int32_t kth = kth_smallest(uppers, state.lanes, state.k, lane);
    if (lane == 0) {
        state.thresholds[query] = bits_as<float>(flip_negative(kth));
        state.counts[query] = 0;
    }
}

// Shared memory of rank_listed_kernel.
struct ListedScratch {
    std::int32_t* uppers;  // [capacity], in the order of the floats
    float* lowers;         // [capacity]
    std::int32_t* slots;   // [capacity], of the rows that stay
    std::int32_t* count;   // [1], of these
    RankedList ranked;     // [capacity + k]

    __device__ ListedScratch(char* shared, int capacity, int k) {
        const auto entries = static_cast<std::size_t>(capacity + k);
        ranked.keys = reinterpret_cast<double*>(shared);
        ranked.rows = reinterpret_cast<std::int64_t*>(ranked.keys + entries);
        slots = reinterpret_cast<std::int32_t*>(ranked.rows + entries);
        count = slots + capacity;
        // Bounds are dropped before the keys come.
        uppers = reinterpret_cast<std::int32_t*>(shared);
        lowers = reinterpret_cast<float*>(uppers + capacity);
    }
    static std::int64_t bytes(std::int64_t capacity, std::int64_t k) {
        return 16 * (capacity + k) + 4 * capacity + 8;
    }
};

// Leaves of the rows of a list those within the k-th smallest upper bound. Returns their number.
__device__ inline int narrow_list(const SearchState& state,
                                  const PackedMemory& memory,
                                  std::int64_t query,
                                  int count,
                                  float spare,
                                  const ListedScratch& scratch) {
    const int thread = static_cast<int>(threadIdx.x);
    const Candidate* listed = state.candidates + query * state.capacity;
    const QueryTerms terms = state.terms[query];
    for (int i = thread; i < count; i += kRankThreads) {
        const float error = score_error(terms, memory.terms[listed[i].slot], spare);
        scratch.lowers[i] = listed[i].score - error;
        scratch.uppers[i] = flip_negative(bits_as<std::int32_t>(listed[i].score + error));
    }
    if (thread == 0) {
        *scratch.count = 0;
    }
    __syncthreads();
    float limit = state.thresholds[query];
    if (count >= state.k) {
        const std::int32_t kth = kth_smallest(scratch.uppers, count, state.k, thread % 32);
        limit = fminf(limit, bits_as<float>(flip_negative(kth)));
    }
    for (int i = thread; i < count; i += kRankThreads) {
        if (scratch.lowers[i] <= limit) {
            scratch.slots[atomicAdd(scratch.count, 1)] = listed[i].slot;
        }
    }
    __syncthreads();
    return *scratch.count;
}

// A thread block ranks the listed rows of a query with the best so far, a warp one row at a time.
// Queries whose list is too short are left to rank_all_kernel.
template <typename Feature>
__global__ void __launch_bounds__(kRankThreads) rank_listed_kernel(RankedRows<Feature> rows,
                                                                   SearchState state,
                                                                   PackedMemory memory,
                                                                   float spare) {
    const std::int64_t query = blockIdx.x;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int listed = state.counts[query];
    if (listed > state.capacity) {
        if (thread == 0) {
            state.overflowed[atomicAdd(state.num_overflowed, 1)] = static_cast<std::int32_t>(query);
        }
        return;
    }
    if (listed == 0) {
        return;
    }
    const ListedScratch scratch(dynamic_shared(), state.capacity, state.k);
    const int count = narrow_list(state, memory, query, listed, spare, scratch);
    for (int i = thread / 32; i < count; i += kRankWarps) {
        const std::int64_t slot = scratch.slots[i], row = memory.map.row(slot);
        const double key = row_key(rows.queries.row(query),
                                   rows.memory.row(row),
                                   rows.memory.dim,
                                   rows.metric,
                                   state.factors[query],
                                   memory.factors[slot],
                                   lane);
        if (lane == 0) {
            scratch.ranked.set(i, key, row);
        }
    }
    for (int i = thread; i < state.k; i += kRankThreads) {
        const std::int64_t place = query * state.k + i;
        scratch.ranked.set(count + i, state.best_keys[place], state.best_rows[place]);
    }
    __syncthreads();
    write_nearest(scratch.ranked, count + state.k, state, query);
}

// Rows that a thread block of rank_all_kernel ranks at a time.
constexpr int kRankedRows = 256;

// Shared memory of rank_all_kernel.
struct RankedScratch {
    RankedList list;      // [kRankedRows + kMostNeighbours]
    long long* limit;     // [1], of the keys that count, in their order
    std::int32_t* count;  // [1], of the rows in the list

    __device__ explicit RankedScratch(char* shared) {
        list.keys = reinterpret_cast<double*>(shared);
        list.rows = reinterpret_cast<std::int64_t*>(list.keys + kEntries);
        limit = reinterpret_cast<long long*>(list.rows + kEntries);
        count = reinterpret_cast<std::int32_t*>(limit + 1);
    }
    static constexpr int kEntries = kRankedRows + static_cast<int>(kMostNeighbours);
    static constexpr int kBytes = 16 * kEntries + 16;
};

// Ranks the rows of slots from `first` on that may precede the k-th best so far. Returns their
// number.
template <typename Feature>
__device__ int rank_slots(const RankedRows<Feature>& rows,
                          const SearchState& state,
                          const PackedMemory& memory,
                          std::int64_t query,
                          std::int64_t first,
                          const RankedScratch& scratch) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    if (thread == 0) {
        *scratch.count = 0;
        // It only ever falls, so that an older one lets more rows through.
        *scratch.limit = atomicMin(state.limits + query, kNoLimit);
    }
    __syncthreads();
    for (int i = thread / 32; i < kRankedRows; i += kRankWarps) {
        const std::int64_t slot = first + i, row = memory.map.row(slot);
        if (!(memory.scores[slot] < infinity()) || !rows.mask.allows(query, row)) {
            continue;
        }
        const double key = row_key(rows.queries.row(query),
                                   rows.memory.row(row),
                                   rows.memory.dim,
                                   rows.metric,
                                   state.factors[query],
                                   memory.factors[slot],
                                   lane);
        if (lane == 0 && !(ordered_key(key) > *scratch.limit)) {
            scratch.list.set(atomicAdd(scratch.count, 1), key, row);
        }
    }
    __syncthreads();
    return *scratch.count;
}

// Merges `count` rows of a query with its best so far, which other thread blocks merge with, too.
__device__ inline void merge_nearest(const SearchState& state,
                                     std::int64_t query,
                                     const RankedList& list,
                                     int count) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        while (atomicCAS(state.locks + query, 0, 1) != 0) {
        }
        __threadfence();
    }
    __syncthreads();
    for (int i = thread; i < state.k; i += kRankThreads) {
        const std::int64_t place = query * state.k + i;
        const volatile double* key = state.best_keys + place;  // not from this processor's cache
        const volatile std::int64_t* row = state.best_rows + place;
        list.set(count + i, *key, *row);
    }
    __syncthreads();
    write_nearest(list, count + state.k, state, query);
    __threadfence();
    __syncthreads();
    if (thread == 0) {
        const volatile double* worst = state.best_keys + (query + 1) * state.k - 1;
        atomicMin(state.limits + query, ordered_key(*worst));
        atomicExch(state.locks + query, 0);
    }
}

// Ranks all rows for the queries whose lists are too short, 256 rows at a time, those of all such
// queries together so that the cache holds the rows. Without such queries it ends at once. Bound by
// the conversions to float64: about 60 microseconds for each query and 10^8 features on an H200.
template <typename Feature>
__global__ void __launch_bounds__(kRankThreads)
    rank_all_kernel(RankedRows<Feature> rows, SearchState state, PackedMemory memory) {
    const RankedScratch scratch(dynamic_shared());
    const std::int64_t num_overflowed = *state.num_overflowed;
    const std::int64_t num_tasks = num_overflowed * (memory.map.num_slots() / kRankedRows);
    for (std::int64_t task = blockIdx.x; task < num_tasks; task += gridDim.x) {
        const std::int64_t query = state.overflowed[task % num_overflowed];
        const std::int64_t first = task / num_overflowed * kRankedRows;
        const int found = rank_slots(rows, state, memory, query, first, scratch);
        if (found > 0) {
            merge_nearest(state, query, scratch.list, found);
        }
        __syncthreads();  // the list is free again
    }
}

constexpr int kOutputThreads = 256;

// Distances from keys; a thread for each neighbour.
static __global__ void __launch_bounds__(kOutputThreads)
    write_neighbours_kernel(SearchState state, Metric metric, NeighbourOutputs outputs) {
    const std::int64_t place = static_cast<std::int64_t>(blockIdx.x) * kOutputThreads + threadIdx.x;
    if (place >= state.num_queries * state.k) {
        return;
    }
    const double key = state.best_keys[place];
    const std::int64_t row = state.best_rows[place];
    double distance = key;
    if (metric == Metric::kEuclidean) {
        distance = sqrt(key);
    } else if (metric == Metric::kInnerProduct) {
        distance = -key;
    }
    if (outputs.dtype == Dtype::kFloat64) {
        static_cast<double*>(outputs.distances)[place] = distance;
    } else {
        static_cast<float*>(outputs.distances)[place] = static_cast<float>(distance);
    }
    outputs.indices[place] = row == kNoRow ? -1 : row;
}

}  // namespace pyfeat::cuda
