// SPDX-License-Identifier: Apache-2.0
// The engine of tile products: tiles of A B^T on tensor cores that an epilogue sees in registers
// and that are then dropped.
//
// A and B are packed in bfloat16 (panels.hpp); products are summed in float32. Two kernels make the
// tiles, the same to an epilogue: tile_products_mma (compute capability 8.0, tiles of 128 x 128)
// and tile_products_wgmma (9.0a, tiles of 128 x 256). An epilogue is a class of this form:
//
//     template <int M, int N>
//     class Sums {
//       public:
//         using Params = SumsParams;                   // by value, also to the kernel
//         static constexpr int kScratchBytes = 0;      // shared memory of the thread block
//         __device__ Sums(const Params& params, const TileThreads& threads);
//         __device__ void begin(std::int64_t row, std::int32_t range);
//         __device__ void tile(const float (&products)[M][N][4], std::int64_t column);
//         __device__ void finish();
//     };
//
// An object lives in every thread that holds products, as long as the thread block. For each task,
// that is 128 rows and a range of column tiles (schedule.hpp): begin, tile once for each tile in
// the order of columns, finish. Warps do not share products: a warp has M 16 rows from `row` on and
// N 8 columns from `column` on, of which a thread has
//     products[i][j][e]   at   row + fragment_row(i, e, lane), column + fragment_column(j, e, lane)
// so that four neighbouring threads have the same rows, and the threads with the same lane % 4 the
// same columns. M N 4 registers hold products: 64 (M 4, N 4, warps 2 x 4 to a tile) or 128 (M 1,
// N 32, warps 8 x 1). Rows and columns that fill up the last panels arrive as products of zeros.
//
// All threads call begin, tile and finish alike, so that TileThreads::sync(), shuffles and votes
// are allowed there. Scratch is the epilogue's own; nothing else of shared memory is.
//
// Launch: launch_tile_products<Sums>(site, a, b, schedule, params) of products.cuh.
#pragma once

#include <cstdint>

#include "cuda/device/barrier.cuh"
#include "cuda/similarity/panels.hpp"
#include "cuda/similarity/schedule.hpp"

namespace pyfeat::cuda {

// Threads of a thread block that hold products.
constexpr int kProductThreads = 256;

struct TileThreads {
    int warp;  // of those that hold products, 0 to 7
    int lane;
    char* scratch;  // Epilogue::kScratchBytes of shared memory, 128-byte aligned

    // Waits for all threads that hold products.
    __device__ void sync() const {
        named_barrier_sync<1, kProductThreads>();
    }
};

// Of element e of a 16 x 8 fragment in a thread: the row and the column within the warp's part.
PYFEAT_HOST_DEVICE constexpr int fragment_row(int i, int e, int lane) {
    return 16 * i + lane / 4 + 8 * (e / 2);
}
PYFEAT_HOST_DEVICE constexpr int fragment_column(int j, int e, int lane) {
    return 8 * j + 2 * (lane % 4) + e % 2;
}

}  // namespace pyfeat::cuda
