// SPDX-License-Identifier: Apache-2.0
// Epilogue: sums of softplus over the rows of similarities, and their gradient.
#pragma once

#include "cuda/similarity/gradient_store.cuh"

namespace pyfeat::cuda {

struct SoftplusTileParams {
    SimilarityParams similarities;  // of unit 1
    const double* bias;             // []
    float* parts;                   // [2, slots, L]: sums of softplus and of signed sigmoids
    std::int64_t num_slots;         // ranges M
    const float* weights;           // [L], of the gradient; null: not wanted
    GradientTiles gradient;
};

// A power and two divisions for each pair, beside which it is little to ask which kind it is. Sums
// over eight pairs are added to those of a range, in float32.
template <int M, int N, typename Value>
class SoftplusEpilogue {
  public:
    using Params = SoftplusTileParams;
    static constexpr int kScratchBytes = 0;

    __device__ SoftplusEpilogue(const Params& params, const TileThreads& threads)
        : params_(params),
          context_(params.similarities),
          bias_(static_cast<float>(*params.bias)),
          warp_(threads.warp),
          lane_(threads.lane) {}

    __device__ void begin(std::int64_t row, std::int32_t range) {
        row_ = row;
        range_ = range;
        context_.begin(row, lane_);
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            softplus_[r] = sigmoids_[r] = 0.0F;
            const bool wanted = params_.weights != nullptr && context_.is_live(r);
            weights_[r] = wanted ? params_.weights[row + thread_row(r, lane_)] : 0.0F;
        }
    }

    __device__ void tile(const float (&products)[M][N][4], std::int64_t column) {
#pragma unroll
        for (int group = 0; group < N / kGroupFragments; ++group) {
            const std::int64_t first = column + group * kGroupWidth;
            GradientGroup<M, Value> gradients;
            Softplus sums[2 * M];
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                sums[r].value = sums[r].sigmoid = 0.0F;
            }
#pragma unroll
            for (int j = 0; j < kGroupFragments; ++j) {
                const PairColumn left = context_.template column<false>(first, 2 * j);
                const PairColumn right = context_.template column<false>(first, 2 * j + 1);
#pragma unroll
                for (int r = 0; r < 2 * M; ++r) {
                    const Softplus low = pair(product_at(products, r, group, 2 * j), r, left);
                    const Softplus high = pair(product_at(products, r, group, 2 * j + 1), r, right);
                    sums[r].value += low.value + high.value;
                    sums[r].sigmoid += low.sigmoid + high.sigmoid;
                    gradients.set(r, j, weights_[r] * low.sigmoid, weights_[r] * high.sigmoid);
                }
            }
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                softplus_[r] += sums[r].value;
                sigmoids_[r] += sums[r].sigmoid;
            }
            if (params_.weights != nullptr) {
                gradients.store(params_.gradient, context_, first, lane_);
            }
        }
    }

    __device__ void finish() {
        const std::int64_t slot = static_cast<std::int64_t>(range_) * M + warp_ % M;
        const std::int64_t num_rows = params_.similarities.num_rows;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const float softplus = over_row_threads(softplus_[r], Add());
            const float sigmoids = over_row_threads(sigmoids_[r], Add());
            if (lane_ % 4 == 0 && context_.is_live(r)) {
                float* at = params_.parts + slot * num_rows + row_ + thread_row(r, lane_);
                at[0] = softplus;
                at[params_.num_slots * num_rows] = sigmoids;
            }
        }
    }

  private:
    __device__ Softplus pair(float product, int r, const PairColumn& column) const {
        const PairKind kind = context_.template kind<false>(r, column);
        const float logit = context_.similarity_of(product, column) + bias_;
        const float z = kind.positive ? -logit : logit;
        const float t = power_of_two(-fabsf(z) * static_cast<float>(kLog2E));
        const Softplus found = softplus_of(z, t, kind.positive);
        return {kind.counted ? found.value : 0.0F, kind.counted ? found.sigmoid : 0.0F};
    }

    const Params& params_;
    PairContext<M> context_;
    float bias_;
    int warp_, lane_;
    std::int64_t row_ = 0;
    std::int32_t range_ = 0;
    float softplus_[2 * M], sigmoids_[2 * M], weights_[2 * M];
};

}  // namespace pyfeat::cuda
