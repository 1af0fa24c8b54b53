// SPDX-License-Identifier: Apache-2.0
// Epilogue: adds products to a matrix.
#pragma once

#include "cuda/similarity/fragments.cuh"

namespace pyfeat::cuda {

struct AddParams {
    float* out;  // [num_rows, num_columns]
    std::int64_t stride, num_rows, num_columns;
};

// Every sum is read and written once, by one thread.
template <int M, int N>
class AddEpilogue {
  public:
    using Params = AddParams;
    static constexpr int kScratchBytes = 0;

    __device__ AddEpilogue(const Params& params, const TileThreads& threads)
        : params_(params), lane_(threads.lane) {}

    __device__ void begin(std::int64_t row, std::int32_t) {
        row_ = row;
    }

    __device__ void tile(const float (&products)[M][N][4], std::int64_t column) {
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const std::int64_t row = row_ + fragment_row(i, e, lane_);
                    const std::int64_t at = column + fragment_column(j, e, lane_);
                    if (row < params_.num_rows && at < params_.num_columns) {
                        params_.out[row * params_.stride + at] += products[i][j][e];
                    }
                }
            }
        }
    }

    __device__ void finish() {}

  private:
    const Params& params_;
    int lane_;
    std::int64_t row_ = 0;
};

}  // namespace pyfeat::cuda
