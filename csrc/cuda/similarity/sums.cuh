// SPDX-License-Identifier: Apache-2.0
// Epilogue: log-sum-exps and sums over positive pairs of the rows and columns of similarities.
#pragma once

#include "cuda/similarity/fragments.cuh"

namespace pyfeat::cuda {

// Parts of sums: for every line the largest exponent, the sum of powers relative to it, with ids
// the sum of exponents of positive pairs, and if wanted the largest exponent of what counts and is
// not positive.
struct SumParts {
    float* values;           // [kinds, slots, lines]; null: not wanted
    std::int64_t num_slots;  // of all that write
    std::int64_t num_lines;
    std::int64_t first_slot;  // of those of this epilogue

    // Of the first kind.
    __device__ float* at(std::int64_t slot) const {
        return values + (first_slot + slot) * num_lines;
    }
    // From one kind to the next.
    __device__ std::int64_t plane() const {
        return num_slots * num_lines;
    }
};

struct SumsParams {
    SimilarityParams similarities;
    SumParts rows;     // slots [ranges, M]
    SumParts columns;  // slots [row panels, 8 / M]: 16 M rows leave one part of a column
    bool ids, largest;
    // Columns are the rows, and the schedule has the tiles from the diagonal on. On it, a tile has
    // all pairs of its columns' rows with its rows: columns leave nothing.
    bool on_diagonal;
    std::int32_t panels_per_tile;  // of columns
};

// A thread keeps sums over its own columns of each of its rows for a whole range of tiles; sums
// over rows leave the warp with every tile. Two powers for each pair. Sums of at most kGroupColumns
// terms are added to those of a range, in float32. kLooks: for plain groups, which does not pay
// beside products in float32.
template <int M, int N, bool kLooks>
class SumsEpilogue {
  public:
    using Params = SumsParams;
    static constexpr int kScratchBytes = 0;

    __device__ SumsEpilogue(const Params& params, const TileThreads& threads)
        : params_(params),
          context_(params.similarities),
          warp_(threads.warp),
          lane_(threads.lane) {}

    __device__ void begin(std::int64_t row, std::int32_t range) {
        row_ = row;
        range_ = range;
        context_.begin(row, lane_);
        column_parts_ = params_.columns.at(row / (16 * M));
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            rows_[r] = {-INFINITY, 0.0F};
            row_positives_[r] = 0.0F;
            row_largest_[r] = -INFINITY;
        }
    }

    __device__ void tile(const float (&products)[M][N][4], std::int64_t column) {
        const bool columns =
            params_.columns.values != nullptr &&
            !(params_.on_diagonal && column / kPanelRows / params_.panels_per_tile ==
                                         row_ / kPanelRows / params_.panels_per_tile);
#pragma unroll
        for (int group = 0; group < N / kGroupFragments; ++group) {
            const std::int64_t first = column + group * kGroupWidth;
            if (params_.largest) {
                take_largest(products, group, first, columns);
            }
            Exponents exponents;
            float positives[kGroupColumns];
            if (kLooks && context_.is_plain(first)) {
                take<true>(products, group, first, exponents, positives);
            } else {
                take<false>(products, group, first, exponents, positives);
            }
            add_rows(exponents);
            if (columns) {
                store_columns(exponents, positives, first);
            }
        }
    }

    __device__ void finish() {
        const std::int64_t slot = static_cast<std::int64_t>(range_) * M + warp_ % M;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const float top = over_row_threads(rows_[r].top, Larger());
            const float factor = power_of_two(rows_[r].top - finite_shift(top));
            const float sum = over_row_threads(rows_[r].sum * factor, Add());
            const float positives = over_row_threads(row_positives_[r], Add());
            const float largest = over_row_threads(row_largest_[r], Larger());
            if (lane_ % 4 == 0 && context_.is_live(r)) {
                float* at = params_.rows.at(slot) + row_ + thread_row(r, lane_);
                const std::int64_t plane = params_.rows.plane();
                store(at, plane, {top, sum}, positives);
                if (params_.largest) {
                    at[(2 + params_.ids) * plane] = largest;
                }
            }
        }
    }

  private:
    using Exponents = float[2 * M][kGroupColumns];

    // The exponents of what has power, -infinity elsewhere, and sums over positive pairs.
    template <bool kPlain>
    __device__ void take(const float (&products)[M][N][4],
                         int group,
                         std::int64_t first,
                         Exponents& exponents,
                         float (&positives)[kGroupColumns]) {
        float of_rows[2 * M];
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            of_rows[r] = 0.0F;
        }
#pragma unroll
        for (int c = 0; c < kGroupColumns; ++c) {
            const PairColumn column = context_.template column<kPlain>(first, c);
            positives[c] = 0.0F;
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                const float z = context_.similarity_of(product_at(products, r, group, c), column);
                const PairKind kind = context_.template kind<kPlain>(r, column);
                exponents[r][c] = context_.template exponent<kPlain>(z, kind);
                const float positive = kind.positive ? z : 0.0F;
                of_rows[r] += positive;
                positives[c] += positive;
            }
        }
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            row_positives_[r] += of_rows[r];
        }
    }

    // Over what counts and is not positive; a pass of its own, as few ask for it.
    __device__ void take_largest(const float (&products)[M][N][4],
                                 int group,
                                 std::int64_t first,
                                 bool columns) {
        float largest[kGroupColumns];
#pragma unroll
        for (int c = 0; c < kGroupColumns; ++c) {
            const PairColumn column = context_.template column<false>(first, c);
            largest[c] = -INFINITY;
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                const float z = context_.similarity_of(product_at(products, r, group, c), column);
                const PairKind kind = context_.template kind<false>(r, column);
                const float other = kind.counted && !kind.positive ? z : -INFINITY;
                row_largest_[r] = Larger()(row_largest_[r], other);
                largest[c] = Larger()(largest[c], other);
            }
        }
        if (columns) {
            const float own = column_total(largest, lane_, Larger());
            const std::int64_t line = own_line(first);
            if (line < params_.similarities.num_columns) {
                column_parts_[(2 + params_.ids) * params_.columns.plane() + line] = own;
            }
        }
    }

    __device__ void add_rows(const Exponents& exponents) {
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            float top = rows_[r].top;
#pragma unroll
            for (int c = 0; c < kGroupColumns; ++c) {
                top = Larger()(top, exponents[r][c]);
            }
            const float shift = finite_shift(top);
            float sum = 0.0F;
#pragma unroll
            for (int c = 0; c < kGroupColumns; ++c) {
                sum += power_of_two(exponents[r][c] - shift);
            }
            rows_[r].sum = fmaf(rows_[r].sum, power_of_two(rows_[r].top - shift), sum);
            rows_[r].top = top;
        }
    }

    // Of the column of this thread in the group that begins at `first`.
    __device__ std::int64_t own_line(std::int64_t first) const {
        return first + thread_column(own_column(lane_), lane_);
    }

    __device__ void store_columns(const Exponents& exponents,
                                  const float (&positives)[kGroupColumns],
                                  std::int64_t first) const {
        float tops[kGroupColumns], sums[kGroupColumns];
#pragma unroll
        for (int c = 0; c < kGroupColumns; ++c) {
            tops[c] = exponents[0][c];
#pragma unroll
            for (int r = 1; r < 2 * M; ++r) {
                tops[c] = Larger()(tops[c], exponents[r][c]);
            }
        }
        const float top = column_total(tops, lane_, Larger());
        spread_columns(finite_shift(top), lane_, tops);
#pragma unroll
        for (int c = 0; c < kGroupColumns; ++c) {
            sums[c] = 0.0F;
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                sums[c] += power_of_two(exponents[r][c] - tops[c]);
            }
        }
        const float sum = column_total(sums, lane_, Add());
        const float of_positives = params_.ids ? column_total(positives, lane_, Add()) : 0.0F;
        const std::int64_t line = own_line(first);
        if (line < params_.similarities.num_columns) {
            store(column_parts_ + line, params_.columns.plane(), {top, sum}, of_positives);
        }
    }

    __device__ void store(float* at,
                          std::int64_t plane,
                          const PowerSum& powers,
                          float positives) const {
        at[0] = powers.top;
        at[plane] = powers.sum;
        if (params_.ids) {
            at[2 * plane] = positives;
        }
    }

    const Params& params_;
    PairContext<M> context_;
    int warp_, lane_;
    std::int64_t row_ = 0;
    std::int32_t range_ = 0;
    float* column_parts_ = nullptr;  // [lines], of these rows
    PowerSum rows_[2 * M];
    float row_positives_[2 * M], row_largest_[2 * M];
};

}  // namespace pyfeat::cuda
