// SPDX-License-Identifier: Apache-2.0
// Tile products by wgmma, for compute capability 9.0 (machine code for 9.0a).
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/device/bulk_copy.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/similarity/engine.cuh"

namespace pyfeat::cuda {

// Tiles of 128 x 256: two warpgroups multiply 64 x 256 each, a third one copies. Four stages of 48
// KiB keep about 3 TB/s on their way while two are in use.
struct WgmmaTile {
    static constexpr int kColumns = 256;
    static constexpr int kStages = 4;
    static constexpr int kThreads = kProductThreads + 128;
    static constexpr int kStageBytes = 3 * kPanelBlockBytes;
    static constexpr int kBarrierBytes = 1024;  // keeps what follows aligned as swizzles want it
    static constexpr int kSharedBytes = kBarrierBytes + kStages * kStageBytes;
    static constexpr int kRowFragments = 1, kColumnFragments = 32;
};

template <template <int, int> class EpilogueOf>
using WgmmaEpilogue = EpilogueOf<WgmmaTile::kRowFragments, WgmmaTile::kColumnFragments>;

using WgmmaProducts = float[WgmmaTile::kRowFragments][WgmmaTile::kColumnFragments][4];

// Stages of shared memory that go round between one thread that fills them and those that read
// them.
struct WgmmaStages {
    char* shared;

    __device__ std::uint64_t* full(int stage) const {
        return reinterpret_cast<std::uint64_t*>(shared) + stage;
    }
    __device__ std::uint64_t* empty(int stage) const {
        return reinterpret_cast<std::uint64_t*>(shared) + WgmmaTile::kStages + stage;
    }
    __device__ char* data(int stage) const {
        return shared + WgmmaTile::kBarrierBytes + stage * WgmmaTile::kStageBytes;
    }
};

// A place in the round: the stage, and the parity of how often it has been filled before.
struct WgmmaPlace {
    int stage = 0;
    int parity = 0;

    __device__ void next() {
        if (++stage == WgmmaTile::kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Of one thread: copies the blocks of all tiles of this thread block.
__device__ inline void copy_wgmma_stages(const WgmmaStages& stages,
                                         const Panels& a,
                                         const Panels& b,
                                         TileCursor cursor) {
    constexpr std::int64_t kValues = kPanelBlockBytes / 2;
    WgmmaPlace place;
    for (; !cursor.done(); cursor.next(), place.next()) {
        barrier_wait(stages.empty(place.stage), place.parity ^ 1);
        std::uint64_t* full = stages.full(place.stage);
        barrier_arrive_expecting(full, WgmmaTile::kStageBytes);
        char* data = stages.data(place.stage);
        const std::int64_t block = cursor.block();
        const std::int64_t row_panel = cursor.row_block();
        const std::int64_t column_panel = 2 * static_cast<std::int64_t>(cursor.column_tile());
        bulk_copy(
            data, a.values + (row_panel * a.num_blocks + block) * kValues, kPanelBlockBytes, full);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bulk_copy(data + (1 + half) * kPanelBlockBytes,
                      b.values + ((column_panel + half) * b.num_blocks + block) * kValues,
                      kPanelBlockBytes,
                      full);
        }
    }
}

// Of a warpgroup: the products of 64 rows of a tile with its 256 columns.
__device__ inline void multiply_wgmma_tile(const WgmmaStages& stages,
                                           int warpgroup,
                                           std::int32_t num_blocks,
                                           WgmmaPlace& place,
                                           WgmmaProducts& products) {
    int previous = -1;
    for (std::int32_t block = 0; block < num_blocks; ++block, place.next()) {
        barrier_wait(stages.full(place.stage), place.parity);
        const char* a = stages.data(place.stage) + warpgroup * 64 * kLineBytes;
        const char* b = stages.data(place.stage) + kPanelBlockBytes;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBlockColumns / 16; ++step) {
            wgmma_m64n256k16_bf16(products[0],
                                  wgmma_operand(a + 32 * step),
                                  wgmma_operand(b + 32 * step),
                                  block > 0 || step > 0);
        }
        wgmma_commit();
        if (previous >= 0) {
            wgmma_wait<1>(products[0]);
            barrier_arrive(stages.empty(previous));
        }
        previous = place.stage;
    }
    wgmma_wait<0>(products[0]);
    barrier_arrive(stages.empty(previous));
}

// One thread block takes every gridDim.x-th task. Bound by the tensor cores: a tile of D columns
// takes 16 D cycles; the second-level cache supplies 85 flop a byte.
template <template <int, int> class EpilogueOf>
__global__ void __launch_bounds__(WgmmaTile::kThreads, 1) tile_products_wgmma(
    Panels a, Panels b, TileSchedule schedule, typename WgmmaEpilogue<EpilogueOf>::Params params) {
    using Epilogue = WgmmaEpilogue<EpilogueOf>;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PYFEAT_EMULATED_CUDA)
    const WgmmaStages stages{dynamic_shared()};
    if (threadIdx.x == 0) {
        for (int i = 0; i < WgmmaTile::kStages; ++i) {
            barrier_init(stages.full(i), 1);
            barrier_init(stages.empty(i), kProductThreads);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const TileCursor first(schedule, blockIdx.x, gridDim.x, a.num_blocks);
    if (threadIdx.x >= kProductThreads) {
        release_registers<40>();
        if (threadIdx.x == kProductThreads) {
            copy_wgmma_stages(stages, a, b, first);
        }
    } else {
        claim_registers<232>();
        const int warp = static_cast<int>(threadIdx.x) / 32;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        Epilogue epilogue(params, TileThreads{warp, lane, stages.shared + WgmmaTile::kSharedBytes});
        TileCursor cursor = first;
        WgmmaPlace place;
        WgmmaProducts products;
        while (!cursor.done()) {
            const bool ends_task = cursor.is_last_tile();
            if (cursor.starts_task()) {
                const std::int64_t row = static_cast<std::int64_t>(cursor.row_block()) * kTileRows;
                epilogue.begin(row + warp * 16, cursor.range());
            }
            multiply_wgmma_tile(stages, warp / 4, a.num_blocks, place, products);
            const std::int64_t tile = cursor.column_tile();
            epilogue.tile(products, tile * WgmmaTile::kColumns);
            cursor.next_tile();
            if (ends_task) {
                epilogue.finish();
            }
        }
    }
#endif
}

}  // namespace pyfeat::cuda
