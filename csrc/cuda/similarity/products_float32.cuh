// SPDX-License-Identifier: Apache-2.0
// Tile products in float32, without tensor cores: what they could multiply is rounded to 10 bits.
#pragma once

#include "cuda/device/copy_async.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/similarity/engine.cuh"
#include "cuda/similarity/products_mma.cuh"

namespace pyfeat::cuda {

// A matrix of float32 in packed form: panels of 128 rows, blocks of 16 columns. A block has its
// columns one after another, so that neighbouring rows lie side by side; what fills up the last
// panel and block is zero.
struct FloatPanels {
    const float* values;  // [panels, blocks, 16, 128], 128-byte aligned
    std::int32_t num_panels;
    std::int32_t num_blocks;
};

constexpr int kFloatColumns = 16;  // of a block
constexpr int kFloatBlock = kFloatColumns * kPanelRows;

// Tiles of 128 x 128, eight warps of 64 x 32, in the fragments of mma.sync. For each column a
// thread reads 8 values of A and 4 pairs of B, 12 cycles of shared memory for 16 of arithmetic.
struct FloatTile {
    static constexpr int kColumns = 128;
    static constexpr int kStages = 3;
    static constexpr int kThreads = kProductThreads;
    static constexpr int kStageBytes = 2 * kFloatBlock * static_cast<int>(sizeof(float));
    static constexpr int kSharedBytes = kStages * kStageBytes;
};

__device__ inline void load_float_stage(float* stage,
                                        const FloatPanels& a,
                                        const FloatPanels& b,
                                        const TileCursor& cursor) {
    const std::int64_t block = cursor.block();
    const float* from_a =
        a.values +
        (static_cast<std::int64_t>(cursor.row_block()) * a.num_blocks + block) * kFloatBlock;
    const float* from_b =
        b.values +
        (static_cast<std::int64_t>(cursor.column_tile()) * b.num_blocks + block) * kFloatBlock;
#pragma unroll
    for (int i = 0; i < kFloatBlock / 4 / FloatTile::kThreads; ++i) {
        const int value = 4 * (i * FloatTile::kThreads + static_cast<int>(threadIdx.x));
        copy_async_16(stage + value, from_a + value);
        copy_async_16(stage + kFloatBlock + value, from_b + value);
    }
}

// Adds the products of one block to those of this warp, column after column.
__device__ inline void multiply_float_stage(const float* stage,
                                            int warp,
                                            int lane,
                                            MmaProducts& products) {
    const float* a = stage + warp / 4 * 64 + lane / 4;
    const float* b = stage + kFloatBlock + warp % 4 * 32 + 2 * (lane % 4);
#pragma unroll 4
    for (int k = 0; k < kFloatColumns; ++k) {
        float rows[MmaTile::kRowFragments][2];
        float2 columns[MmaTile::kColumnFragments];
#pragma unroll
        for (int i = 0; i < MmaTile::kRowFragments; ++i) {
            rows[i][0] = a[k * kPanelRows + 16 * i];
            rows[i][1] = a[k * kPanelRows + 16 * i + 8];
        }
#pragma unroll
        for (int j = 0; j < MmaTile::kColumnFragments; ++j) {
            columns[j] = *reinterpret_cast<const float2*>(b + k * kPanelRows + 8 * j);
        }
#pragma unroll
        for (int i = 0; i < MmaTile::kRowFragments; ++i) {
#pragma unroll
            for (int j = 0; j < MmaTile::kColumnFragments; ++j) {
                float (&sums)[4] = products[i][j];
                sums[0] = fmaf(rows[i][0], columns[j].x, sums[0]);
                sums[1] = fmaf(rows[i][0], columns[j].y, sums[1]);
                sums[2] = fmaf(rows[i][1], columns[j].x, sums[2]);
                sums[3] = fmaf(rows[i][1], columns[j].y, sums[3]);
            }
        }
    }
}

// Operands of a staged product of float32 values.
struct FloatOperands {
    using Packed = FloatPanels;
    static constexpr int kStages = FloatTile::kStages;
    static constexpr int kStageBytes = FloatTile::kStageBytes;

    __device__ static void load(char* stage,
                                const Packed& a,
                                const Packed& b,
                                const TileCursor& cursor) {
        load_float_stage(reinterpret_cast<float*>(stage), a, b, cursor);
    }
    __device__ static void multiply(const char* stage, int warp, int lane, MmaProducts& products) {
        multiply_float_stage(reinterpret_cast<const float*>(stage), warp, lane, products);
    }
};

// Bound by float32 arithmetic, 67 TFLOP/s on an H200.
template <template <int, int> class EpilogueOf>
__global__ void __launch_bounds__(FloatTile::kThreads, 1)
    tile_products_float32(FloatPanels a,
                          FloatPanels b,
                          TileSchedule schedule,
                          typename MmaEpilogue<EpilogueOf>::Params params) {
    staged_tile_products<FloatOperands, EpilogueOf>(a, b, schedule, params);
}

}  // namespace pyfeat::cuda
