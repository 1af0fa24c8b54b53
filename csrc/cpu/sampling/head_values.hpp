// SPDX-License-Identifier: Apache-2.0
// The values of batches and heads as the kernels read them: where they are, or packed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

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

    // Makes ready the values of a group. All pairs of a cell at a time, which lie side by side in
    // memory.
    void pack(Range pairs, Execution& execution) {
        if (!packs_) {
            return;
        }
        const std::int64_t count = pairs.end - pairs.first;
        packed_.make_room(count * pair_size());
        std::vector<const char*> rows(static_cast<std::size_t>(count));
        for (std::int64_t i = 0; i < count; ++i) {
            rows[static_cast<std::size_t>(i)] = first_row(pairs.first + i);
        }
        const std::int64_t stride = params_.value_strides[1] * bytes_of(params_.dtype);
        const std::int64_t num_tasks = num_chunks(params_.num_cells, kCellsPerTask);
        execution.parallel_for(num_tasks, [&](std::int64_t task, int) {
            const std::int64_t end = std::min(params_.num_cells, (task + 1) * kCellsPerTask);
            for (std::int64_t s = task * kCellsPerTask; s < end; ++s) {
                for (std::int64_t i = 0; i < count; ++i) {
                    const char* row = rows[static_cast<std::size_t>(i)] + s * stride;
                    Real* to = packed_.data() + i * pair_size() + s * width_;
                    if (params_.dtype == kDtype) {
                        std::copy_n(reinterpret_cast<const Real*>(row), params_.dim, to);
                    } else {
                        kernels_.load(row, params_.dtype, params_.dim, to);
                    }
                }
            }
        });
    }

    // Of a pair in the group that was made ready last.
    Cells<const Real> cells(std::int64_t pair, Range group) {
        if (packs_) {
            const Real* first = packed_.data() + (pair - group.first) * pair_size();
            return {first, width_, outside_.data()};
        }
        return {reinterpret_cast<const Real*>(first_row(pair)),
                params_.value_strides[1],
                outside_.data()};
    }

  private:
    static constexpr Dtype kDtype =
        sizeof(Real) == sizeof(double) ? Dtype::kFloat64 : Dtype::kFloat32;
    static constexpr std::int64_t kCellsPerTask = 256;
    static constexpr std::int64_t kPackedBytes = 8LL << 20;
    // Rows of values are read so often before packing them pays.
    static constexpr std::int64_t kLeastReads = 4;

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
