// SPDX-License-Identifier: Apache-2.0
// The nearest of some picks to every row, where one is nearer than what the row knows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/limits.hpp"
#include "cpu/similarity/pack.hpp"
#include "params.hpp"

namespace pyfeat {

// The least of `nearest` and the squared distances of a row to all picks [P, D], in float64.
inline double nearest_of(const Rows& picks,
                         const void* row,
                         double nearest,
                         const RowKernels& kernels) {
    for (std::int64_t i = 0; i < picks.num_rows; ++i) {
        const auto* pick = static_cast<const double*>(picks.row(i));
        nearest = std::min(nearest, kernels.squared_distance(pick, row, 1.0, picks.dim));
    }
    return nearest;
}

// The picks that may be nearer to a row than what it knows wait in a short list; when it is full,
// their distances are taken, the most promising first. Collector of a Sweep, a slot for each row.
class NearerPicks {
  public:
    NearerPicks(const Rows& rows,
                const Rows& picks,
                const RowKernels& kernels,
                const ScoreLimits& limits,
                const PackedQueries& queries)
        : rows_(rows),
          picks_(picks),
          kernels_(kernels),
          limits_(limits),
          queries_(queries),
          thresholds_(queries.beyond.size(), -std::numeric_limits<float>::infinity()),
          nearest_(queries.beyond.size(), std::numeric_limits<double>::infinity()),
          num_taken_(queries.beyond.size(), 0),
          num_waiting_(queries.beyond.size(), 0),
          waiting_(queries.beyond.size() * kCapacity) {}

    const float* thresholds() const {
        return thresholds_.data();
    }
    double nearest(std::int64_t slot) const {
        return nearest_[to_size(slot)];
    }
    std::int64_t num_taken(std::int64_t slot) const {
        return num_taken_[to_size(slot)];
    }

    // Only picks nearer than `squared_distance` are of use.
    void lower(std::int64_t slot, double squared_distance) {
        const std::size_t s = to_size(slot);
        nearest_[s] = squared_distance;
        thresholds_[s] = limits_.at(queries_.terms[s], squared_distance);
    }

    void offer(std::int64_t slot, const ScoreRange& score, std::int64_t pick) {
        const std::size_t s = to_size(slot);
        if (score.lower <= thresholds_[s]) {
            waiting_[s * kCapacity + num_waiting_[s]] = {score.lower,
                                                         static_cast<std::int32_t>(pick)};
            if (++num_waiting_[s] == kCapacity) {
                settle(slot);
            }
        }
    }

    // None waits any more.
    void settle(std::int64_t slot) {
        const std::size_t s = to_size(slot);
        Waiting* waiting = &waiting_[s * kCapacity];
        Waiting* end = waiting + num_waiting_[s];
        std::sort(waiting, end, [](const Waiting& a, const Waiting& b) {
            return a.lower < b.lower || (a.lower == b.lower && a.pick < b.pick);
        });
        for (const Waiting* next = waiting; next != end && next->lower <= thresholds_[s]; ++next) {
            const auto* pick = static_cast<const double*>(picks_.row(next->pick));
            const double distance =
                kernels_.squared_distance(pick, rows_.row(slot), 1.0, rows_.dim);
            ++num_taken_[s];
            if (distance < nearest_[s]) {
                lower(slot, distance);
            }
        }
        num_waiting_[s] = 0;
    }

  private:
    static std::size_t to_size(std::int64_t value) {
        return static_cast<std::size_t>(value);
    }
    static constexpr std::size_t kCapacity = 8;
    struct Waiting {
        float lower;
        std::int32_t pick;
    };

    const Rows& rows_;   // [slots, D]
    const Rows& picks_;  // [P, D], float64
    const RowKernels& kernels_;
    const ScoreLimits& limits_;
    const PackedQueries& queries_;
    std::vector<float> thresholds_;  // [slots]
    std::vector<double> nearest_;
    std::vector<std::int32_t> num_taken_;
    std::vector<std::uint8_t> num_waiting_;
    std::vector<Waiting> waiting_;  // [slots, capacity]
};

}  // namespace pyfeat
