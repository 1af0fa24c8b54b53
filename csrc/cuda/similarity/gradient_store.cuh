// SPDX-License-Identifier: Apache-2.0
// Stores tiles of the gradient by the similarities in the dtype in which they will be multiplied.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/similarity/contrast.hpp"
#include "cuda/similarity/fragments.cuh"

namespace pyfeat::cuda {

__device__ inline std::uint32_t packed_pair(float low, float high, __nv_bfloat16) {
    return static_cast<std::uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(low))) |
           static_cast<std::uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}
__device__ inline std::uint32_t packed_pair(float low, float high, __half) {
    return static_cast<std::uint32_t>(__half_as_ushort(__float2half_rn(low))) |
           static_cast<std::uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
}

// A thread of four that have the same row has the pairs of every fragment at its own place; in the
// end it has all pairs of the fragment of its number.
__device__ inline void transpose_pairs(std::uint32_t (&pairs)[kGroupFragments], int lane) {
#pragma unroll
    for (int distance = 1; distance < kGroupFragments; distance *= 2) {
        const bool upper = (lane & distance) != 0;
#pragma unroll
        for (int j = 0; j < kGroupFragments; ++j) {
            if ((j & distance) == 0) {
                const std::uint32_t sent = upper ? pairs[j] : pairs[j + distance];
                const std::uint32_t got = __shfl_xor_sync(kWholeWarp, sent, distance);
                (upper ? pairs[j] : pairs[j + distance]) = got;
            }
        }
    }
}

// Where the gradient of a block goes; null: nowhere.
struct GradientTiles {
    void* values;              // [num_rows, num_columns], 16-byte aligned
    std::int64_t stride;       // in values, a multiple of 8
    std::int64_t num_columns;  // with room for whole panels
};
inline GradientTiles gradient_tiles(const GradientBlock& block, const PackedPair& pair) {
    return {block.values, block.stride, ceil_div(pair.num_columns, kPanelRows) * kPanelRows};
}

// Takes the gradient of a group column by column, of all rows of a thread; all threads of the warp
// call it alike. In 16 bits four threads write 64 bytes of a row side by side, 16 each.
template <int M, typename Value>
class GradientGroup {
  public:
    // The columns 2 j and 2 j + 1 of row r.
    __device__ void set(int r, int j, float low, float high) {
        pairs_[r][j] = packed_pair(low, high, Value());
    }
    __device__ void store(const GradientTiles& tiles,
                          const PairContext<M>& context,
                          std::int64_t first,
                          int lane) {
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            std::uint32_t (&pairs)[kGroupFragments] = pairs_[r];
            transpose_pairs(pairs, lane);
            if (first < tiles.num_columns) {
                auto* at = static_cast<std::uint16_t*>(tiles.values) +
                           static_cast<std::int64_t>(context.row(r)) * tiles.stride + first +
                           8 * (lane % 4);
                *reinterpret_cast<uint4*>(at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    }

  private:
    std::uint32_t pairs_[2 * M][kGroupFragments];
};

template <int M>
class GradientGroup<M, float> {
  public:
    __device__ void set(int r, int j, float low, float high) {
        pairs_[r][j] = make_float2(low, high);
    }
    __device__ void store(const GradientTiles& tiles,
                          const PairContext<M>& context,
                          std::int64_t first,
                          int lane) const {
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            auto* at = static_cast<float*>(tiles.values) +
                       static_cast<std::int64_t>(context.row(r)) * tiles.stride + first +
                       2 * (lane % 4);
#pragma unroll
            for (int j = 0; j < kGroupFragments; ++j) {
                if (first < tiles.num_columns) {
                    *reinterpret_cast<float2*>(at + 8 * j) = pairs_[r][j];
                }
            }
        }
    }

  private:
    float2 pairs_[2 * M][kGroupFragments];
};

}  // namespace pyfeat::cuda
