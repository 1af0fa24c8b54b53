// SPDX-License-Identifier: Apache-2.0
// Tile products by mma.sync, for every GPU from compute capability 8.0 on.
#pragma once

#include "cuda/device/copy_async.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/similarity/engine.cuh"

namespace pyfeat::cuda {

// Tiles of 128 x 128, eight warps of 64 x 32. Three stages of 32 KiB fit the 99 KiB of consumer
// GPUs.
struct MmaTile {
    static constexpr int kColumns = 128;
    static constexpr int kStages = 3;
    static constexpr int kThreads = kProductThreads;
    static constexpr int kStageBytes = 2 * kPanelBlockBytes;
    static constexpr int kSharedBytes = kStages * kStageBytes;
    static constexpr int kRowFragments = 4, kColumnFragments = 4;
};

template <template <int, int> class EpilogueOf>
using MmaEpilogue = EpilogueOf<MmaTile::kRowFragments, MmaTile::kColumnFragments>;

using MmaProducts = float[MmaTile::kRowFragments][MmaTile::kColumnFragments][4];

// Starts the copies of a block of both operands; each thread copies four pieces of either.
__device__ inline void load_mma_stage(char* stage,
                                      const Panels& a,
                                      const Panels& b,
                                      const TileCursor& cursor) {
    constexpr std::int64_t kValues = kPanelBlockBytes / 2;
    const std::int64_t block = cursor.block();
    const auto* from_a =
        a.values + (static_cast<std::int64_t>(cursor.row_block()) * a.num_blocks + block) * kValues;
    const auto* from_b =
        b.values +
        (static_cast<std::int64_t>(cursor.column_tile()) * b.num_blocks + block) * kValues;
#pragma unroll
    for (int i = 0; i < kPanelBlockBytes / 16 / MmaTile::kThreads; ++i) {
        const int piece = i * MmaTile::kThreads + static_cast<int>(threadIdx.x);
        copy_async_16(stage + piece * 16, from_a + piece * 8);
        copy_async_16(stage + kPanelBlockBytes + piece * 16, from_b + piece * 8);
    }
}

// Adds the products of one block, 64 columns of both operands, to those of this warp. Values are
// bfloat16, or float16 in the same layout.
template <bool kFloat16>
__device__ inline void multiply_mma_stage(const char* stage,
                                          int warp,
                                          int lane,
                                          MmaProducts& products) {
    const char* a = stage + (warp / 4) * 64 * kLineBytes;
    const char* b = stage + kPanelBlockBytes + (warp % 4) * 32 * kLineBytes;
#pragma unroll
    for (int step = 0; step < kBlockColumns / 16; ++step) {
        std::uint32_t rows[MmaTile::kRowFragments][4], columns[MmaTile::kColumnFragments][2];
#pragma unroll
        for (int i = 0; i < MmaTile::kRowFragments; ++i) {
            ldmatrix_x4(rows[i], a + swizzled_piece(16 * i + lane % 16, 2 * step + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < MmaTile::kColumnFragments; j += 2) {
            std::uint32_t pair[4];
            const int line = 8 * j + lane / 16 * 8 + lane % 8;
            ldmatrix_x4(pair, b + swizzled_piece(line, 2 * step + lane / 8 % 2));
            columns[j][0] = pair[0];
            columns[j][1] = pair[1];
            columns[j + 1][0] = pair[2];
            columns[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < MmaTile::kRowFragments; ++i) {
#pragma unroll
            for (int j = 0; j < MmaTile::kColumnFragments; ++j) {
                if constexpr (kFloat16) {
                    mma_m16n8k16_f16(products[i][j], rows[i], columns[j]);
                } else {
                    mma_m16n8k16_bf16(products[i][j], rows[i], columns[j]);
                }
            }
        }
    }
}

template <int M, int N>
__device__ void clear_products(float (&products)[M][N][4]) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                products[i][j][e] = 0.0F;
            }
        }
    }
}

// Operands of a staged product of 16-bit values.
template <bool kFloat16>
struct MmaOperands {
    using Packed = Panels;
    static constexpr int kStages = MmaTile::kStages;
    static constexpr int kStageBytes = MmaTile::kStageBytes;

    __device__ static void load(char* stage,
                                const Packed& a,
                                const Packed& b,
                                const TileCursor& cursor) {
        load_mma_stage(stage, a, b, cursor);
    }
    __device__ static void multiply(const char* stage, int warp, int lane, MmaProducts& products) {
        multiply_mma_stage<kFloat16>(stage, warp, lane, products);
    }
};

// One thread block takes every gridDim.x-th task. Copies run two blocks ahead of the products, also
// across tiles and tasks, so that an epilogue runs while the next tile is on its way.
template <typename Operands, template <int, int> class EpilogueOf>
__device__ void staged_tile_products(const typename Operands::Packed& a,
                                     const typename Operands::Packed& b,
                                     const TileSchedule& schedule,
                                     const typename MmaEpilogue<EpilogueOf>::Params& params) {
    constexpr int kStages = Operands::kStages, kStageBytes = Operands::kStageBytes;
    char* shared = dynamic_shared();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    MmaEpilogue<EpilogueOf> epilogue(params,
                                     TileThreads{warp, lane, shared + kStages * kStageBytes});
    TileCursor loading(schedule, blockIdx.x, gridDim.x, a.num_blocks), cursor = loading;

    int load_stage = 0, stage = 0;
    const auto load_next = [&] {
        if (!loading.done()) {
            Operands::load(shared + load_stage * kStageBytes, a, b, loading);
            loading.next();
        }
        copy_async_commit();  // also where there is nothing left: groups are counted
        load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        load_next();
    }

    MmaProducts products;
    clear_products(products);
    for (; !cursor.done(); cursor.next()) {
        const std::int64_t row = static_cast<std::int64_t>(cursor.row_block()) * kTileRows;
        if (cursor.starts_task()) {
            epilogue.begin(row + warp / 4 * 64, cursor.range());
        }
        copy_async_wait<kStages - 2>();
        __syncthreads();  // the stage is there for all, and the one before it is free
        load_next();
        Operands::multiply(shared + stage * kStageBytes, warp, lane, products);
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if (cursor.ends_tile()) {
            const std::int64_t tile = cursor.column_tile();
            epilogue.tile(products, tile * MmaTile::kColumns + warp % 4 * 32);
            clear_products(products);
            if (cursor.is_last_tile()) {
                epilogue.finish();
            }
        }
    }
}

// Bound by the tensor cores; the second-level cache supplies 64 flop a byte. Machine code for 9.0a
// has none of it: there tiles come from wgmma.
template <template <int, int> class EpilogueOf>
__global__ void __launch_bounds__(MmaTile::kThreads, 1) tile_products_mma(
    Panels a, Panels b, TileSchedule schedule, typename MmaEpilogue<EpilogueOf>::Params params) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
    staged_tile_products<MmaOperands<false>, EpilogueOf>(a, b, schedule, params);
#endif
}

// The same of float16 values.
template <template <int, int> class EpilogueOf>
__global__ void __launch_bounds__(MmaTile::kThreads, 1) tile_products_mma_f16(
    Panels a, Panels b, TileSchedule schedule, typename MmaEpilogue<EpilogueOf>::Params params) {
    staged_tile_products<MmaOperands<true>, EpilogueOf>(a, b, schedule, params);
}

}  // namespace pyfeat::cuda
