// SPDX-License-Identifier: Apache-2.0
// What is said of pairs, in the form that tiles read it: filled up for the last panel, the bias in
// the units of powers of two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/products.hpp"
#include "params.hpp"

namespace pyfeat {

// Ids of rows or columns in panels, filled up with one that no other has; none if there are none.
class PanelIds {
  public:
    PanelIds(const std::int32_t* ids, std::int64_t count, int width, std::int32_t none)
        : width_(width) {
        if (ids == nullptr) {
            return;
        }
        padded_.reserve(count + kPadding);
        std::memcpy(padded_.data(), ids, static_cast<std::size_t>(count) * sizeof(float));
        for (std::int64_t i = 0; i < kPadding; ++i) {
            std::memcpy(padded_.data() + count + i, &none, sizeof(none));
        }
        for (std::int64_t i = 0; i < count; i += width) {
            const auto [least, most] =
                std::minmax_element(ids + i, ids + std::min(count, i + width));
            ranges_.push_back({*least, *most});
        }
    }

    bool empty() const {
        return ranges_.empty();
    }
    // From the first row or column of a panel on.
    const float* from(std::int64_t first) const {
        return padded_.data() + first;
    }
    // Whether the panel of this row may have an id of the panel of that column.
    bool may_meet(std::int64_t row, const PanelIds& columns, std::int64_t column) const {
        const Range& ours = ranges_[static_cast<std::size_t>(row / width_)];
        const Range& theirs = columns.ranges_[static_cast<std::size_t>(column / columns.width_)];
        return ours.least <= theirs.most && theirs.least <= ours.most;
    }

    static constexpr std::int64_t kPadding = kMaxTileQueries + kMaxTileRows;

  private:
    struct Range {
        std::int32_t least, most;
    };

    int width_;
    AlignedFloats padded_;
    std::vector<Range> ranges_;  // of every panel
};

class PaddedTerms {
  public:
    PaddedTerms(const PairTerms& pairs,
                std::int64_t num_rows,
                std::int64_t num_columns,
                const TileKernels& tiles)
        : row_ids_(pairs.row_ids, num_rows, tiles.queries, kNoRow),
          column_ids_(pairs.column_ids, num_columns, tiles.rows, kNoColumn),
          row_groups_(pairs.row_groups, num_rows, tiles.queries, kNoRow),
          column_groups_(pairs.column_groups, num_columns, tiles.rows, kNoColumn),
          keep_positives_(pairs.keep_positives),
          separate_positives_(pairs.separate_positives),
          only_positives_(pairs.only_positives) {
        if (pairs.column_bias != nullptr) {
            const std::int64_t padded = num_columns + PanelIds::kPadding;
            column_bias_.reserve(padded);
            std::fill_n(column_bias_.data(), padded, 0.0F);
            for (std::int64_t c = 0; c < num_columns; ++c) {
                column_bias_.data()[c] =
                    static_cast<float>(kLog2E * static_cast<double>(pairs.column_bias[c]));
            }
        }
    }

    // Of the tile of these panels, named by their first row and column; without ids and groups of
    // which no two can be equal.
    PairTile tile(std::int64_t row, std::int64_t column) const {
        const bool ids = !row_ids_.empty() && row_ids_.may_meet(row, column_ids_, column);
        const bool groups =
            !row_groups_.empty() && row_groups_.may_meet(row, column_groups_, column);
        return {column_bias_.data() == nullptr ? nullptr : column_bias_.data() + column,
                ids ? row_ids_.from(row) : nullptr,
                ids ? column_ids_.from(column) : nullptr,
                groups ? row_groups_.from(row) : nullptr,
                groups ? column_groups_.from(column) : nullptr,
                keep_positives_,
                separate_positives_,
                only_positives_};
    }

  private:
    // Ids of rows and columns that are not there equal none.
    static constexpr std::int32_t kNoRow = -1, kNoColumn = -2;

    PanelIds row_ids_, column_ids_, row_groups_, column_groups_;
    AlignedFloats column_bias_;
    bool keep_positives_, separate_positives_, only_positives_;
};

// The same, rows and columns being counted from these on, which are the first of a panel.
struct TileTerms {
    const PaddedTerms& all;
    std::int64_t first_row, first_column;

    PairTile tile(std::int64_t row, std::int64_t column) const {
        return all.tile(first_row + row, first_column + column);
    }
};

}  // namespace pyfeat
