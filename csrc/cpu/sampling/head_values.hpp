// SPDX-License-Identifier: Apache-2.0
// The values of batches and heads as the kernels read them: where they are, or packed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/blocks.hpp"
#include "cpu/sampling/kernels.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

struct Range {
    std::int64_t first, end;
};

// A pair is a batch and a head: number p stands for batch p / H and head p % H. Its rows lie H D
// apart in memory, so that few lines of a cache can hold them: where they are read often, they are
// packed first. So are values of another dtype than Real.
template <typename Real>
class HeadValues {
  public:
    HeadValues(const DeformAttnParams& params,
               const SamplingKernels<Real>& kernels,
               const PointTable<Real>& points)
        : params_(params),
          kernels_(kernels),
          width_(num_chunks(params.dim, kPointBlock) * kPointBlock),
          packs_(params.dtype != kDtype ||
                 params.num_queries * points.num_points * points.num_corners() >=
                     kLeastReads * params.num_cells) {
        outside_.make_zeros(width_);
    }

    bool packs() const {
        return packs_;
    }
    // Features of a packed row.
    std::int64_t width() const {
        return width_;
    }
    // From one row to the next.
    std::int64_t row_bytes() const {
        return packs_ ? width_ * static_cast<std::int64_t>(sizeof(Real)) : stride();
    }
    // What stands for cells outside.
    Real* outside() {
        return outside_.data();
    }

    // How many pairs there are values of at a time: all if they are read where they are.
    std::int64_t group(std::int64_t num_pairs, int num_threads) const {
        const std::int64_t num_bytes = pair_size() * static_cast<std::int64_t>(sizeof(Real));
        const std::int64_t fitting = kPackedBytes / std::max<std::int64_t>(num_bytes, 1);
        return packs_ ? std::min(num_pairs, std::max<std::int64_t>(fitting, num_threads))
                      : num_pairs;
    }

    // Makes ready the values of a group. All pairs of some cells at a time, which lie side by side
    // in memory.
    void pack(Range pairs, Execution& execution) {
        if (!packs_) {
            return;
        }
        packed_.make_room((pairs.end - pairs.first) * pair_size());
        const std::int64_t num_tasks = num_chunks(params_.num_cells, kCellsPerTask);
        execution.parallel_for(num_tasks, [&](std::int64_t task, int) {
            const std::int64_t end = std::min(params_.num_cells, (task + 1) * kCellsPerTask);
            for (std::int64_t p = pairs.first; p < pairs.end; ++p) {
                pack_cells(p,
                           {task * kCellsPerTask, end},
                           packed_.data() + (p - pairs.first) * pair_size());
            }
        });
    }

    // Of a pair in the group that was made ready last.
    Cells<const Real> cells(std::int64_t pair, Range group) {
        return packs_ ? packed_cells(packed_.data() + (pair - group.first) * pair_size())
                      : cells_of(pair);
    }

    // Of one pair, in memory of the thread that asks.
    Cells<const Real> packed_for(std::int64_t pair, AlignedArray<Real>& memory) {
        if (!packs_) {
            return cells_of(pair);
        }
        memory.make_room(pair_size());
        pack_cells(pair, {0, params_.num_cells}, memory.data());
        return packed_cells(memory.data());
    }

  private:
    static constexpr Dtype kDtype =
        sizeof(Real) == sizeof(double) ? Dtype::kFloat64 : Dtype::kFloat32;
    static constexpr std::int64_t kCellsPerTask = 256;
    static constexpr std::int64_t kPackedBytes = 8LL << 20;
    // Rows of values are read so often before packing them pays.
    static constexpr std::int64_t kLeastReads = 4;

    void pack_cells(std::int64_t pair, Range cells, Real* packed) const {
        kernels_.load(first_row(pair) + cells.first * stride(),
                      params_.dtype,
                      stride(),
                      cells.end - cells.first,
                      params_.dim,
                      packed + cells.first * width_,
                      width_);
    }
    Cells<const Real> packed_cells(const Real* first) {
        return {first, width_, outside_.data()};
    }
    Cells<const Real> cells_of(std::int64_t pair) {
        return {reinterpret_cast<const Real*>(first_row(pair)),
                params_.value_strides[1],
                outside_.data()};
    }

    std::int64_t stride() const {
        return params_.value_strides[1] * bytes_of(params_.dtype);
    }
    std::int64_t pair_size() const {
        return params_.num_cells * width_;
    }
    const char* first_row(std::int64_t pair) const {
        const std::int64_t* strides = params_.value_strides;
        const std::int64_t first =
            pair / params_.heads * strides[0] + pair % params_.heads * strides[2];
        return static_cast<const char*>(params_.value) + first * bytes_of(params_.dtype);
    }

    const DeformAttnParams& params_;
    const SamplingKernels<Real>& kernels_;
    std::int64_t width_;
    bool packs_;
    AlignedArray<Real> outside_, packed_;
};

}  // namespace pyfeat
