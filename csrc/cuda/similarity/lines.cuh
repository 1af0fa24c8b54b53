// SPDX-License-Identifier: Apache-2.0
// Kernels of losses over all pairs that look at single rows: packing, and sums of lines.
#pragma once

#include "cuda/device/shared.cuh"
#include "cuda/similarity/contrast.hpp"
#include "cuda/similarity/pairs.hpp"
#include "cuda/similarity/panels.hpp"
#include "cuda/similarity/products_float32.cuh"

namespace pyfeat::cuda {

constexpr int kLineThreads = 256;

struct PackParams {
    const void* features;  // [num_rows, dim]
    std::int64_t num_rows, dim, stride;
    void* packed;
    std::int64_t num_blocks;
};

// Copies a block of a panel of 16-bit values (panels.hpp); blockIdx.x is its number. A thread packs
// one 16-byte piece at a time. Bound by memory: 2 bytes read and 2 written.
__global__ void __launch_bounds__(kLineThreads) pack_16_bits_kernel(PackParams params) {
    const std::int64_t panel = blockIdx.x / params.num_blocks;
    const std::int64_t block = blockIdx.x % params.num_blocks;
    const auto* features = static_cast<const std::uint16_t*>(params.features);
    char* packed = static_cast<char*>(params.packed) +
                   static_cast<std::int64_t>(blockIdx.x) * kPanelBlockBytes;
    for (int place = static_cast<int>(threadIdx.x); place < kPanelBlockBytes / 16;
         place += kLineThreads) {
        const int line = place / 8, piece = place % 8;
        const std::int64_t row = panel * kPanelRows + line;
        const std::int64_t column = block * kBlockColumns + piece * kPieceColumns;
        std::uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            std::uint32_t values[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const std::int64_t at = column + 2 * i + j;
                values[j] = row < params.num_rows && at < params.dim
                                ? features[row * params.stride + at]
                                : 0U;
            }
            pairs[i] = values[0] | values[1] << 16;
        }
        *reinterpret_cast<uint4*>(packed + swizzled_piece(line, piece)) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// The same of float32 (FloatPanels): a thread has one row of a panel and half of a block's columns.
__global__ void __launch_bounds__(kLineThreads) pack_float32_kernel(PackParams params) {
    const std::int64_t panel = blockIdx.x / params.num_blocks;
    const std::int64_t block = blockIdx.x % params.num_blocks;
    const auto* features = static_cast<const float*>(params.features);
    float* packed =
        static_cast<float*>(params.packed) + static_cast<std::int64_t>(blockIdx.x) * kFloatBlock;
    const int line = static_cast<int>(threadIdx.x) % kPanelRows;
    const std::int64_t row = panel * kPanelRows + line;
    for (int k = static_cast<int>(threadIdx.x) / kPanelRows; k < kFloatColumns;
         k += kLineThreads / kPanelRows) {
        const std::int64_t column = block * kFloatColumns + k;
        packed[k * kPanelRows + line] = row < params.num_rows && column < params.dim
                                            ? features[row * params.stride + column]
                                            : 0.0F;
    }
}

constexpr int kMergedLines = 32;  // of a thread block
constexpr int kMergeWarps = 8;    // that take every eighth slot of all these lines

// Parts of a line from one slot on, every eighth.
struct MergedLine {
    double total = 0.0, positives = 0.0;
    float top = -INFINITY, largest = -INFINITY;
};
constexpr std::size_t kMergeBytes = sizeof(MergedLine) * kMergeWarps * kMergedLines;

// One thread of a warp for each line, so that parts are read 128 bytes at a time; read twice, for
// the largest exponent and for the sums relative to it. Sums in float64, in a fixed order.
__global__ void __launch_bounds__(kMergedLines* kMergeWarps)
    merge_parts_kernel(MergeSumsCall call) {
    auto* merged = reinterpret_cast<MergedLine(*)[kMergedLines]>(dynamic_shared());
    const int warp = static_cast<int>(threadIdx.x) / kMergedLines;
    const int lane = static_cast<int>(threadIdx.x) % kMergedLines;
    const std::int64_t line = static_cast<std::int64_t>(blockIdx.x) * kMergedLines + lane;
    const bool live = line < call.num_lines;
    const std::int64_t plane = call.num_slots * call.num_lines;
    const float* parts = call.parts + (live ? line : 0);
    const int largest_kind = call.positives != nullptr ? 3 : 2;
    MergedLine mine;
    for (std::int64_t slot = warp; slot < call.num_slots; slot += kMergeWarps) {
        const float* at = parts + slot * call.num_lines;
        mine.top = fmaxf(mine.top, at[0]);
        if (call.largest != nullptr) {
            mine.largest = fmaxf(mine.largest, at[largest_kind * plane]);
        }
    }
    merged[warp][lane].top = mine.top;
    __syncthreads();
    double shift = live ? call.lse[line] * kLog2E : -INFINITY;
    const double before = shift;
    for (int i = 0; i < kMergeWarps; ++i) {
        shift = fmax(shift, static_cast<double>(merged[i][lane].top));
    }
    shift = shift == -INFINITY ? 0.0 : shift;
    for (std::int64_t slot = warp; slot < call.num_slots; slot += kMergeWarps) {
        const float* at = parts + slot * call.num_lines;
        const auto exponent = static_cast<float>(static_cast<double>(at[0]) - shift);
        mine.total += static_cast<double>(at[plane]) * static_cast<double>(exp2f(exponent));
        if (call.positives != nullptr) {
            mine.positives += static_cast<double>(at[2 * plane]);
        }
    }
    __syncthreads();
    merged[warp][lane] = mine;
    __syncthreads();
    if (warp == 0 && live) {
        MergedLine all;
        all.total = exp2(before - shift);
        for (int i = 0; i < kMergeWarps; ++i) {
            all.total += merged[i][lane].total;
            all.positives += merged[i][lane].positives;
            all.largest = fmaxf(all.largest, merged[i][lane].largest);
        }
        call.lse[line] = all.total == 0.0 ? -INFINITY : (shift + log2(all.total)) * kLog2;
        if (call.positives != nullptr) {
            call.positives[line] += all.positives * kLog2;
        }
        if (call.largest != nullptr) {
            call.largest[line] = fmax(call.largest[line], static_cast<double>(all.largest) * kLog2);
        }
    }
}

__global__ void __launch_bounds__(kLineThreads) gradient_terms_kernel(GradientTermsCall call) {
    const std::int64_t line =
        static_cast<std::int64_t>(blockIdx.x) * kLineThreads + static_cast<int>(threadIdx.x);
    if (line < call.num_lines) {
        const LineGradient terms =
            line_gradient(call.lse[line], call.weights[line], call.positives[line], *call.factor);
        call.terms[line] = terms.shift;
        call.terms[call.num_lines + line] = terms.weight;
        call.terms[2 * call.num_lines + line] = terms.positive;
    }
}

}  // namespace pyfeat::cuda
