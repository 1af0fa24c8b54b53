// SPDX-License-Identifier: Apache-2.0
// What is the same for the points of every query and head, one slot for each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.hpp"
#include "cpu/isa.hpp"
#include "cpu/sampling/kernels.hpp"
#include "params.hpp"

namespace pyfeat {

template <typename Real>
class FilledPointTable {
  public:
    explicit FilledPointTable(const DeformAttnParams& params) {
        const int n = params.num_dims;
        PYFEAT_CHECK(params.num_cells <= INT32_MAX,
                     "deform_attn: value must have fewer than 2^31 cells, S, got ",
                     params.num_cells);
        std::int64_t num_points = 0;
        for (const std::int64_t count : params.num_points) {
            num_points += count;
        }
        const std::int64_t slots = (num_points + kPointBlock - 1) / kPointBlock * kPointBlock;
        // Slots without a point lie on a level without cells.
        factors_.assign(static_cast<std::size_t>(n * slots), Real{0});
        extents_.assign(static_cast<std::size_t>(n * slots), 0);
        strides_.assign(static_cast<std::size_t>(n * slots), 0);
        starts_.assign(static_cast<std::size_t>(slots), 0);
        const std::int64_t row_bytes = params.dim * static_cast<std::int64_t>(sizeof(Real));
        std::int64_t slot = 0, start = 0;
        for (std::size_t level = 0; level < params.num_points.size(); ++level) {
            const std::int64_t* shape = params.shapes.data() + level * static_cast<std::size_t>(n);
            std::int64_t cells = 1;
            for (int j = 0; j < n; ++j) {
                const std::int64_t extent = shape[n - 1 - j];
                const std::int64_t factor = params.align_corners ? extent - 1 : extent;
                for (std::int64_t t = 0; t < params.num_points[level]; ++t) {
                    const auto at = static_cast<std::size_t>(j * slots + slot + t);
                    factors_[at] = static_cast<Real>(factor);
                    extents_[at] = static_cast<std::int32_t>(extent);
                    strides_[at] = static_cast<std::int32_t>(cells);
                }
                cells *= extent;
            }
            for (std::int64_t t = 0; t < params.num_points[level]; ++t) {
                starts_[static_cast<std::size_t>(slot + t)] = static_cast<std::int32_t>(start);
            }
            slot += params.num_points[level];
            start += cells;
            if (cells * row_bytes >= kFarBytes) {
                table_.num_far = slot;
            }
            levels_.push_back({cells, slot});
        }
        table_.num_dims = n;
        table_.num_points = num_points;
        table_.num_slots = slots;
        table_.shift = params.align_corners ? Real{0} : Real{0.5};
        for (int j = 0; j < n; ++j) {
            table_.factors[j] = factors_.data() + j * slots;
            table_.extents[j] = extents_.data() + j * slots;
            table_.strides[j] = strides_.data() + j * slots;
        }
        table_.starts = starts_.data();
        table_.border = params.border;
        table_.discrete = params.discrete;
        table_.softmax = params.softmax;
    }
    FilledPointTable(const FilledPointTable&) = delete;
    FilledPointTable& operator=(const FilledPointTable&) = delete;

    // Rows of values lie so many bytes apart.
    void space_rows(std::int64_t num_bytes) {
        table_.num_distant = 0;
        for (const Level& level : levels_) {
            if (level.num_cells * num_bytes >= 2 * second_level_cache_bytes()) {
                table_.num_distant = std::min(level.end, table_.num_far);
            }
        }
    }
    const PointTable<Real>& points() const {
        return table_;
    }

  private:
    // Of one head's values of a level: more than a first-level cache and a good part of the second.
    static constexpr std::int64_t kFarBytes = 128 << 10;

    struct Level {
        std::int64_t num_cells, end;  // of its points
    };

    std::vector<Level> levels_;
    std::vector<Real> factors_;                    // [n, slots]
    std::vector<std::int32_t> extents_, strides_;  // [n, slots]
    std::vector<std::int32_t> starts_;             // [slots]
    PointTable<Real> table_{};
};

}  // namespace pyfeat
