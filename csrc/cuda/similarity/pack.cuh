// SPDX-License-Identifier: Apache-2.0
// Rounds rows to packed bfloat16 and measures what that loses. Bound by memory: 4 bytes read and 2
// written for each float32 feature.
#pragma once

#include "cuda/device/shared.cuh"
#include "cuda/similarity/features.cuh"
#include "cuda/similarity/packed_memory.hpp"
#include "cuda/similarity/search_state.hpp"

namespace pyfeat::cuda {

constexpr int kPackWarps = 16;
constexpr int kPackThreads = 32 * kPackWarps;

// What packing finds out about a row.
struct PackedRow {
    PackedSums sums;
    double factor;  // 1 / ||x|| for cosine, else 1
    bool finite;
};

// Blocks of a row that are loaded before the first of them is packed: enough bytes on their way.
constexpr int kLoadedBlocks = 4;

// Packs column after column of a row; of one thread.
class ColumnPacker {
  public:
    __device__ ColumnPacker(const DeviceFrame& frame, double factor)
        : mean_(frame.mean), scale_(*frame.scale), factor_(factor) {}

    // Bits of the packed value of a column that the row has.
    __device__ std::uint32_t pack(double raw, std::int64_t column) {
        const double mean = mean_[column], x = (raw * factor_ - mean) * scale_;
        const double clamped = fmin(fmax(x, -kLargestNorm), kLargestNorm);
        const Bfloat16 rounded = to_bfloat16(static_cast<float>(clamped));
        const double error = x - static_cast<double>(rounded);
        sums_.residual = fma(error, error, sums_.residual);
        sums_.squared = fma(x, x, sums_.squared);
        sums_.mean_product = fma(x, mean, sums_.mean_product);
        finite_ = finite_ && raw - raw == 0.0;
        return rounded.bits;
    }

    // Of all threads of the warp.
    __device__ PackedRow result() const {
        return {{warp_sum(sums_.residual),
                 warp_sum(sums_.squared),
                 warp_sum(sums_.mean_product) * scale_},
                factor_,
                __all_sync(kWholeWarp, finite_) != 0};
    }

  private:
    const double* mean_;  // [D]
    double scale_, factor_;
    PackedSums sums_{0.0, 0.0, 0.0};
    bool finite_ = true;
};

// Packs a row into line `slot` of the panels, by a warp: a block of 64 columns at a time, two for
// each thread. A row that is not there becomes zeros.
template <typename Feature>
__device__ PackedRow pack_row(const Feature* row,
                              bool live,
                              const DeviceFrame& frame,
                              Metric metric,
                              std::int64_t dim,
                              const Panels& panels,
                              std::int64_t slot,
                              int lane) {
    const std::int64_t inside = live ? dim : 0;
    ColumnPacker packer(frame,
                        live && metric == Metric::kCosine ? unit_factor(row, dim, lane) : 1.0);
    auto* values = const_cast<std::uint16_t*>(panels.values);
    for (std::int32_t first = 0; first < panels.num_blocks; first += kLoadedBlocks) {
        Feature raw[kLoadedBlocks][2];
#pragma unroll
        for (int i = 0; i < 2 * kLoadedBlocks; ++i) {
            const std::int64_t column = (first + i / 2) * kBlockColumns + 2 * lane + i % 2;
            raw[i / 2][i % 2] = column < inside ? row[column] : Feature{};
        }
#pragma unroll
        for (int i = 0; i < kLoadedBlocks; ++i) {
            const std::int64_t column = (first + i) * kBlockColumns + 2 * lane;
            std::uint32_t pair = 0;
            if (column < inside) {
                pair = packer.pack(static_cast<double>(raw[i][0]), column);
            }
            if (column + 1 < inside) {
                pair |= packer.pack(static_cast<double>(raw[i][1]), column + 1) << 16;
            }
            if (first + i < panels.num_blocks) {
                const std::int64_t at = packed_offset(slot, column, panels.num_blocks);
                *reinterpret_cast<std::uint32_t*>(values + at) = pair;
            }
        }
    }
    return packer.result();
}

// The score of a row without the query's part: q.x = (q - m).(x - m) + m.(x - m) + q.m, the last
// equal for all rows. For cosine a row of zeros counts as a unit vector orthogonal to every query.
PYFEAT_HOST_DEVICE inline double row_score(const PackedSums& sums,
                                           Metric metric,
                                           double factor,
                                           double scale) {
    if (metric == Metric::kInnerProduct) {
        return -sums.mean_product;
    }
    const double score = 0.5 * sums.squared;
    return metric == Metric::kCosine && factor == 0.0 ? score + 0.5 * scale * scale : score;
}

__device__ inline RowTerms largest_terms(const RowTerms& x, const RowTerms& y) {
    return {0.0F, fmaxf(x.reach, y.reach), fmaxf(x.norm, y.norm), fmaxf(x.slack, y.slack)};
}

// A thread block packs a panel, a warp every 16th row of it. Rows that `allowed` [N] rules out and
// those that are not finite are not there.
template <typename Feature>
__global__ void __launch_bounds__(kPackThreads, 2) pack_memory_kernel(FeatureRows<Feature> rows,
                                                                      const std::uint8_t* allowed,
                                                                      DeviceFrame frame,
                                                                      Metric metric,
                                                                      PackedMemory packed) {
    auto* largest = reinterpret_cast<RowTerms*>(dynamic_shared());  // [kPackWarps]
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    RowTerms limit{0.0F, 0.0F, 0.0F, 0.0F};
    for (int line = warp; line < kPanelRows; line += kPackWarps) {
        const std::int64_t slot = static_cast<std::int64_t>(blockIdx.x) * kPanelRows + line;
        const std::int64_t row = packed.map.row(slot);
        const bool live = row < packed.map.end && (allowed == nullptr || allowed[row] != 0);
        const PackedRow found = pack_row(
            rows.row(live ? row : 0), live, frame, metric, rows.dim, packed.panels(), slot, lane);
        RowTerms terms{infinity(), 0.0F, 0.0F, 0.0F};
        if (live && found.finite) {
            const double score = row_score(found.sums, metric, found.factor, *frame.scale);
            terms = row_terms(found.sums, score, static_cast<double>(rows.dim));
            limit = largest_terms(limit, terms);
        }
        if (lane == 0) {
            packed.terms[slot] = terms;
            packed.scores[slot] = terms.score;
            packed.factors[slot] = found.factor;
        }
    }
    if (lane == 0) {
        largest[warp] = limit;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < kPackWarps; ++i) {
            limit = largest_terms(limit, largest[i]);
        }
        packed.panel_terms[blockIdx.x] = limit;
    }
}

// A warp packs a query and makes its search begin anew.
template <typename Feature>
__global__ void __launch_bounds__(kPackThreads, 1) pack_queries_kernel(FeatureRows<Feature> queries,
                                                                       DeviceFrame frame,
                                                                       Metric metric,
                                                                       SearchState state) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const std::int64_t query = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + warp;
    const bool live = query < state.num_queries;
    const PackedRow found = pack_row(queries.row(live ? query : 0),
                                     live,
                                     frame,
                                     metric,
                                     queries.dim,
                                     state.panels(),
                                     query,
                                     lane);
    if (!live) {
        return;
    }
    if (lane == 0) {
        state.terms[query] =
            found.finite ? query_terms(found.sums, *frame.shift, static_cast<double>(queries.dim))
                         : QueryTerms{nan_value(), 0.0F, 0.0F, 0.0F};
        state.factors[query] = found.factor;
        state.thresholds[query] = infinity();
        state.locks[query] = 0;
        state.limits[query] = INT64_MAX;
    }
    for (std::int32_t i = lane; i < state.lanes; i += 32) {
        state.lane_uppers[query * state.lanes + i] =
            flip_negative(bits_as<std::int32_t>(infinity()));
    }
    for (std::int32_t i = lane; i < state.k; i += 32) {
        state.best_keys[query * state.k + i] = static_cast<double>(infinity());
        state.best_rows[query * state.k + i] = kNoRow;
    }
}

}  // namespace pyfeat::cuda
