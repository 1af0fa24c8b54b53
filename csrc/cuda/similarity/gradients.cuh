// SPDX-License-Identifier: Apache-2.0
// Epilogue: the gradient of log-sum-exps and positive sums by the similarities, in tiles that are
// stored to be multiplied with features.
#pragma once

#include <type_traits>

#include "cuda/similarity/gradient_store.cuh"

namespace pyfeat::cuda {

struct PowerTerm {
    float shift, weight;
};

// Shift, weight and positive of every line (LineGradient).
struct LineTerms {
    const float* values;  // [3, lines]; null: the lines have no part
    std::int64_t plane;   // from one of the three to the next

    template <bool kExists>
    __device__ PowerTerm power(std::int64_t line, std::int64_t num_lines) const {
        if (values == nullptr || (!kExists && line >= num_lines)) {
            return {kNoPower, 0.0F};
        }
        return {values[line], values[plane + line]};
    }
    __device__ float positive(std::int64_t line) const {
        return values == nullptr ? 0.0F : values[2 * plane + line];
    }
};

struct GradientParams {
    SimilarityParams similarities;
    LineTerms rows, columns;
    GradientTiles gradient;
    double* sums;  // [tasks, 8]: of G a.b over the range of every warp, before G is rounded
    std::int32_t ranges;
};

// Two powers for each pair, and its gradient is stored once. Sums over the products of a row of a
// group are added up in float64.
template <int M, int N, typename Value>
class GradientEpilogue {
  public:
    using Params = GradientParams;
    static constexpr int kScratchBytes = 0;

    __device__ GradientEpilogue(const Params& params, const TileThreads& threads)
        : params_(params),
          context_(params.similarities),
          warp_(threads.warp),
          lane_(threads.lane) {}

    __device__ void begin(std::int64_t row, std::int32_t range) {
        panel_ = row / kPanelRows;
        range_ = range;
        sum_ = 0.0;
        context_.begin(row, lane_);
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            rows_[r] = params_.rows.power<false>(context_.row(r), params_.similarities.num_rows);
        }
    }

    __device__ void tile(const float (&products)[M][N][4], std::int64_t column) {
#pragma unroll
        for (int group = 0; group < N / kGroupFragments; ++group) {
            const std::int64_t first = column + group * kGroupWidth;
            GradientGroup<M, Value> gradients;
            if (kLooks && context_.is_plain(first)) {
                take<true>(products, group, first, gradients);
            } else {
                take<false>(products, group, first, gradients);
            }
            gradients.store(params_.gradient, context_, first, lane_);
        }
    }

    __device__ void finish() {
        const double sum = warp_sum(sum_);
        if (lane_ == 0) {
            params_.sums[(panel_ * params_.ranges + range_) * 8 + warp_] = sum;
        }
    }

  private:
    // Products in float32 take so long that it does not pay to look for plain groups.
    static constexpr bool kLooks = !std::is_same_v<Value, float>;

    // Hands the gradient of a group on, and adds up its products with a.b.
    template <bool kPlain>
    __device__ void take(const float (&products)[M][N][4],
                         int group,
                         std::int64_t first,
                         GradientGroup<M, Value>& gradients) {
        float sums[2 * M];
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            sums[r] = 0.0F;
        }
#pragma unroll
        for (int j = 0; j < kGroupFragments; ++j) {
            float x[2][2 * M], values[2][2 * M];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int c = 2 * j + h;
#pragma unroll
                for (int r = 0; r < 2 * M; ++r) {
                    x[h][r] = product_at(products, r, group, c);
                }
                weigh<kPlain>(x[h], context_.template column<kPlain>(first, c), values[h]);
            }
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                sums[r] = fmaf(values[1][r], x[1][r], fmaf(values[0][r], x[0][r], sums[r]));
                gradients.set(r, j, values[0][r], values[1][r]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            sum_ += static_cast<double>(sums[r]);
        }
    }

    // The gradient by the similarities of a column; all columns of a plain group exist.
    template <bool kPlain>
    __device__ void weigh(const float (&products)[2 * M],
                          const PairColumn& column,
                          float (&values)[2 * M]) const {
        const PowerTerm of_column =
            params_.columns.power<kPlain>(column.index, params_.similarities.num_columns);
        bool some_positive = false;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const float z = context_.similarity_of(products[r], column);
            const PairKind kind = context_.template kind<kPlain>(r, column);
            const float exponent = context_.template exponent<kPlain>(z, kind);
            some_positive |= kind.positive;
            values[r] = rows_[r].weight * power_of_two(exponent - rows_[r].shift) +
                        of_column.weight * power_of_two(exponent - of_column.shift);
        }
        if (some_positive) {  // rare: terms of positive pairs are read where they are needed
            const float pulled = params_.columns.positive(column.index);
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                if (context_.template kind<kPlain>(r, column).positive) {
                    values[r] += params_.rows.positive(context_.row(r)) + pulled;
                }
            }
        }
    }

    const Params& params_;
    PairContext<M> context_;
    int warp_, lane_;
    std::int64_t panel_ = 0;
    std::int32_t range_ = 0;
    double sum_ = 0.0;
    PowerTerm rows_[2 * M];
};

}  // namespace pyfeat::cuda
