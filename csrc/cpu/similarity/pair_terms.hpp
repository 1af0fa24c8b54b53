// SPDX-License-Identifier: Apache-2.0
// What is said of pairs, in the form that tiles read it: filled up for the last panel, the bias in
// the units of powers of two.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/products.hpp"
#include "params.hpp"

namespace pyfeat {

// Of the rows and columns from some on.
struct TileTerms {
    PairTile terms;

    bool empty() const {
        return terms.column_bias == nullptr && terms.row_ids == nullptr &&
               terms.row_groups == nullptr;
    }
    PairTile tile(std::int64_t row, std::int64_t column) const {
        const auto at = [](const float* values, std::int64_t index) {
            return values == nullptr ? nullptr : values + index;
        };
        return {at(terms.column_bias, column),
                at(terms.row_ids, row),
                at(terms.column_ids, column),
                at(terms.row_groups, row),
                at(terms.column_groups, column),
                terms.keep_positives,
                terms.separate_positives,
                terms.only_positives};
    }
};

class PaddedTerms {
  public:
    PaddedTerms(const PairTerms& pairs, std::int64_t num_rows, std::int64_t num_columns)
        : keep_positives_(pairs.keep_positives),
          separate_positives_(pairs.separate_positives),
          only_positives_(pairs.only_positives) {
        // Ids of rows and columns that are not there equal none.
        constexpr std::int32_t kNoRow = -1, kNoColumn = -2;
        pad(pairs.row_ids, num_rows, kNoRow, row_ids_);
        pad(pairs.column_ids, num_columns, kNoColumn, column_ids_);
        pad(pairs.row_groups, num_rows, kNoRow, row_groups_);
        pad(pairs.column_groups, num_columns, kNoColumn, column_groups_);
        if (pairs.column_bias != nullptr) {
            column_bias_.reserve(num_columns + kPadding);
            std::fill_n(column_bias_.data(), num_columns + kPadding, 0.0F);
            for (std::int64_t c = 0; c < num_columns; ++c) {
                column_bias_.data()[c] =
                    static_cast<float>(kLog2E * static_cast<double>(pairs.column_bias[c]));
            }
        }
    }

    // Rows and columns count from these on, which are the first of a panel.
    TileTerms from(std::int64_t row, std::int64_t column) const {
        const TileTerms all{{column_bias_.data(),
                             row_ids_.data(),
                             column_ids_.data(),
                             row_groups_.data(),
                             column_groups_.data(),
                             keep_positives_,
                             separate_positives_,
                             only_positives_}};
        return {all.tile(row, column)};
    }

  private:
    static constexpr std::int64_t kPadding = kMaxTileQueries + kMaxTileRows;

    static void pad(const std::int32_t* ids,
                    std::int64_t count,
                    std::int32_t none,
                    AlignedFloats& padded) {
        if (ids == nullptr) {
            return;
        }
        padded.reserve(count + kPadding);
        std::memcpy(padded.data(), ids, static_cast<std::size_t>(count) * sizeof(float));
        for (std::int64_t i = 0; i < kPadding; ++i) {
            std::memcpy(padded.data() + count + i, &none, sizeof(none));
        }
    }

    AlignedFloats column_bias_, row_ids_, column_ids_, row_groups_, column_groups_;
    bool keep_positives_, separate_positives_, only_positives_;
};

}  // namespace pyfeat
