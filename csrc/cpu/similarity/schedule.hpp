// SPDX-License-Identifier: Apache-2.0
// Who works on which pairs of rows and columns when, so that sums are added up in one order
// whatever the number of threads, and no two tasks add to the same sum at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/similarity/kernels.hpp"

namespace pyfeat {

// Rows and columns of one task, first and end, in whole panels but for the last.
struct PartPair {
    PanelRange rows, columns;
    bool mirrored;  // stands for (columns, rows) as well
};

// Rows and columns are cut into as many parts, of whole panels. In round t a task has part p of the
// rows and part p + t of the columns to itself. Of a batch with itself the parts meet as in a
// tournament: every pair once, in rounds where every part is in one pair, after a round of every
// part with itself.
class PairSchedule {
  public:
    PairSchedule(std::int64_t num_rows,
                 std::int64_t num_columns,
                 const TileKernels& tiles,
                 bool itself)
        : num_rows_(num_rows),
          num_columns_(num_columns),
          row_unit_(itself ? tiles.own_unit() : tiles.queries),
          column_unit_(itself ? row_unit_ : tiles.rows),
          itself_(itself),
          num_parts_(count_parts(std::min(num_rows, num_columns))) {}

    std::int64_t num_rounds() const {
        return itself_ ? num_players() : num_parts_;
    }

    std::vector<PartPair> round(std::int64_t index) const {
        std::vector<PartPair> pairs;
        if (!itself_ || index == 0) {
            for (std::int64_t p = 0; p < num_parts_; ++p) {
                add(p, (p + index) % num_parts_, false, pairs);
            }
            return pairs;
        }
        // One player stays where it is, the others go round it.
        const std::int64_t others = num_players() - 1, turn = index - 1;
        for (std::int64_t k = 0; k < num_players() / 2; ++k) {
            const std::int64_t p = (turn + k) % others;
            const std::int64_t q = k == 0 ? others : (turn - k + others) % others;
            if (std::max(p, q) < num_parts_) {
                add(std::min(p, q), std::max(p, q), true, pairs);
            }
        }
        return pairs;
    }

  private:
    static constexpr std::int64_t kLeastPart = 64, kGoodPart = 256, kFewParts = 8, kMostParts = 32;

    // Sums that a part adds to come from the third-level cache, the less often the larger parts
    // are; but there must be some for every thread.
    std::int64_t count_parts(std::int64_t count) const {
        const std::int64_t most = count / std::max<std::int64_t>(row_unit_, kLeastPart);
        return std::clamp<std::int64_t>(
            std::min(most, std::max(kFewParts, count / kGoodPart)), 1, kMostParts);
    }
    // With an odd number of parts somebody pauses.
    std::int64_t num_players() const {
        return num_parts_ + num_parts_ % 2;
    }
    PanelRange part(std::int64_t count, std::int64_t unit, std::int64_t index) const {
        const std::int64_t units = (count + unit - 1) / unit;
        return {std::min(count, units * index / num_parts_ * unit),
                std::min(count, units * (index + 1) / num_parts_ * unit)};
    }
    void add(std::int64_t rows,
             std::int64_t columns,
             bool mirrored,
             std::vector<PartPair>& pairs) const {
        pairs.push_back({part(num_rows_, row_unit_, rows),
                         part(num_columns_, column_unit_, columns),
                         mirrored});
    }

    std::int64_t num_rows_, num_columns_;
    std::int64_t row_unit_, column_unit_;
    bool itself_;
    std::int64_t num_parts_;
};

}  // namespace pyfeat
