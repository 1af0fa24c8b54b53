// SPDX-License-Identifier: Apache-2.0
// Epilogues of the search (engine.cuh): which rows may be among the k nearest.
//
// First a sample of the tiles gives every query a threshold: the k-th smallest of upper bounds on
// the scores of different rows, which the k-th nearest row of all cannot exceed. Then all tiles are
// multiplied, and a row is listed where its lower bound is within the threshold.
#pragma once

#include "cuda/similarity/engine.cuh"
#include "cuda/similarity/features.cuh"
#include "cuda/similarity/search_state.hpp"

namespace pyfeat::cuda {

struct ShortlistParams {
    SearchState state;
    PackedMemory memory;
    PairMask mask;
    float spare;                // factor of the error bounds
    std::int32_t tile_columns;  // of the kernel that multiplies
    std::int32_t tile_step;     // every so many tiles are sampled
};

// Of the rows of products that a thread has: their queries, and what bounds their scores.
template <int M>
struct QueryFragment {
    std::int64_t first = 0;  // query of the first row of the warp
    QueryTerms terms[2 * M];
    float thresholds[2 * M];

    __device__ std::int64_t query(int r, int lane) const {
        return first + fragment_row(r / 2, 2 * (r % 2), lane);
    }
    __device__ void load(const SearchState& state, std::int64_t first_query, int lane) {
        first = first_query;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const bool inside = query(r, lane) < state.num_queries;
            terms[r] =
                inside ? state.terms[query(r, lane)] : QueryTerms{nan_value(), 0.0F, 0.0F, 0.0F};
            thresholds[r] = inside ? state.thresholds[query(r, lane)] : 0.0F;
        }
    }
};

// Keeps, of a sample of the tiles, the least upper bound of every group of eight rows.
template <int M, int N>
class SampleUppers {
  public:
    using Params = ShortlistParams;
    static constexpr int kScratchBytes = 0;

    __device__ SampleUppers(const Params& params, const TileThreads& threads)
        : params_(params), lane_(threads.lane) {}

    __device__ void begin(std::int64_t row, std::int32_t) {
        queries_.load(params_.state, row, lane_);
    }

    __device__ void tile(const float (&products)[M][N][4], std::int64_t column) {
#pragma unroll
        for (int first = 0; first < N; first += kGroupFragments) {
            float uppers[2 * M];
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                uppers[r] = infinity();
            }
#pragma unroll
            for (int j = first; j < first + kGroupFragments; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const std::int64_t slot = column + fragment_column(j, c, lane_);
                    const RowTerms row = params_.memory.terms[slot];
#pragma unroll
                    for (int r = 0; r < 2 * M; ++r) {
                        const float product = products[r / 2][j][2 * (r % 2) + c];
                        uppers[r] = fminf(uppers[r], upper_bound(r, slot, row, product));
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                offer(r, column + 8 * first, uppers[r]);
            }
        }
    }

    __device__ void finish() {}

  private:
    static constexpr int kGroupFragments = 4;

    // Infinite for a row that may not be found; NaN, which fminf ignores, for a query that finds
    // none.
    __device__ float upper_bound(int r,
                                 std::int64_t slot,
                                 const RowTerms& row,
                                 float product) const {
        const float upper =
            row.score - product + score_error(queries_.terms[r], row, params_.spare);
        if (params_.mask.data == nullptr) {
            return upper;
        }
        const bool allowed =
            upper < infinity() &&
            params_.mask.allows(queries_.query(r, lane_), params_.memory.map.row(slot));
        return allowed ? upper : infinity();
    }

    // Groups go round the lanes in the order of sampled columns.
    __device__ void offer(int r, std::int64_t column, float upper) const {
        if (upper < infinity()) {
            const std::int64_t tile = column / params_.tile_columns / params_.tile_step;
            const std::int64_t sampled =
                tile * params_.tile_columns + column % params_.tile_columns;
            const std::int64_t group = sampled / (8 * kGroupFragments) * 4 + lane_ % 4;
            const std::int32_t lanes = params_.state.lanes;
            atomicMin(params_.state.lane_uppers + queries_.query(r, lane_) * lanes + group % lanes,
                      flip_negative(bits_as<std::int32_t>(upper)));
        }
    }

    const Params& params_;
    int lane_;
    QueryFragment<M> queries_;
};

// Scores of two neighbouring columns, loaded together.
struct alignas(8) ScorePair {
    float first, second;
};

// Lists the rows whose lower bound is within the threshold of the query.
//
// The largest errors of a panel of rows decide first, for the least score that a thread has of a
// query: two instructions for each product. Where that passes, which is rare, the errors of single
// rows do.
template <int M, int N>
class ListWithin {
  public:
    using Params = ShortlistParams;
    static constexpr int kScratchBytes = 0;

    __device__ ListWithin(const Params& params, const TileThreads& threads)
        : params_(params), lane_(threads.lane) {}

    __device__ void begin(std::int64_t row, std::int32_t) {
        queries_.load(params_.state, row, lane_);
    }

    __device__ void tile(const float (&products)[M][N][4], std::int64_t column) {
#pragma unroll
        for (int first = 0; first < N; first += kFragments) {
            panel(products, first, column + 8 * first);
        }
    }

    __device__ void finish() {}

  private:
    // Of one panel, as far as the warp has it.
    static constexpr int kFragments = N < kPanelRows / 8 ? N : kPanelRows / 8;

    // Products of kFragments fragments from `first` on, whose columns begin at `column`.
    __device__ void panel(const float (&products)[M][N][4], int first, std::int64_t column) {
        float least[2 * M];
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            least[r] = infinity();
        }
        const auto* scores =
            reinterpret_cast<const ScorePair*>(params_.memory.scores + column) + lane_ % 4;
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
            const ScorePair pair = scores[4 * j];
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                const int e = 2 * (r % 2);
                least[r] = fminf(least[r],
                                 fminf(pair.first - products[r / 2][first + j][e],
                                       pair.second - products[r / 2][first + j][e + 1]));
            }
        }
        const RowTerms largest = params_.memory.panel_terms[column / kPanelRows];
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const float error = score_error(queries_.terms[r], largest, params_.spare);
            if (least[r] - error <= queries_.thresholds[r]) {
                list_row(products, r, first, column + 2 * (lane_ % 4), error);
            }
        }
    }

    // Lists what passes of row r of a panel; `slot` is that of the thread's first column.
    __device__ void list_row(
        const float (&products)[M][N][4], int r, int first, std::int64_t slot, float error) {
        std::uint32_t passing = 0;  // bit 2 j + c: fragment first + j, column c of its pair
#pragma unroll
        for (int i = 0; i < 2 * kFragments; ++i) {
            const float score = params_.memory.scores[slot + i / 2 * 8 + i % 2] -
                                products[r / 2][first + i / 2][2 * (r % 2) + i % 2];
            passing |= static_cast<std::uint32_t>(score - error <= queries_.thresholds[r]) << i;
        }
        while (passing != 0) {
            const int bit = __ffs(static_cast<int>(passing)) - 1;
            passing &= passing - 1;
            float product = 0.0F;  // registers have no index: each is asked
#pragma unroll
            for (int i = 0; i < 2 * kFragments; ++i) {
                const float of_bit = products[r / 2][first + i / 2][2 * (r % 2) + i % 2];
                product = bit == i ? of_bit : product;
            }
            list_slot(queries_.query(r, lane_),
                      queries_.terms[r],
                      queries_.thresholds[r],
                      slot + bit / 2 * 8 + bit % 2,
                      product);
        }
    }

    __device__ void list_slot(std::int64_t query,
                              const QueryTerms& terms,
                              float threshold,
                              std::int64_t slot,
                              float product) const {
        const SearchState& state = params_.state;
        const RowTerms row = params_.memory.terms[slot];
        const float score = row.score - product;
        const float lower = score - score_error(terms, row, params_.spare);
        if (!(score < infinity() && lower <= threshold) ||
            !params_.mask.allows(query, params_.memory.map.row(slot))) {
            return;
        }
        const std::int32_t place = atomicAdd(state.counts + query, 1);
        if (place < state.capacity) {
            state.candidates[query * state.capacity + place] = {static_cast<std::int32_t>(slot),
                                                                score};
        }
    }

    const Params& params_;
    int lane_;
    QueryFragment<M> queries_;
};

}  // namespace pyfeat::cuda
