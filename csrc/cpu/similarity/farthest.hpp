// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: k-centre greedy, the row farthest from all rows picked so far.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

struct PackedMemory;

// A row and how far it is. Picks come in this order: the farther row, of equals the lower index.
struct Candidate {
    double squared_distance;
    std::int64_t row;

    bool before(const Candidate& other) const {
        return squared_distance > other.squared_distance ||
               (squared_distance == other.squared_distance && row < other.row);
    }
};

// Counts of the whole search, for tests and benchmarks.
struct FarthestCounters {
    std::int64_t distances = 0;  // of a row and a pick, taken in float64
    std::int64_t products = 0;   // of a row and a pick, in tiles
    std::int64_t levels = 0;
};

// What a row knows is its squared distance to the nearest of the picks that it has seen: the more
// it sees, the lower that falls, so it bounds the distance to all picks from above.
//
// A level divides the rows. Those before it are active: they are few, lie side by side and see
// every pick at once. The others are dormant and miss picks. As long as the first of the active
// rows is before the level, it is before all dormant rows too, whatever these have missed: it is
// the next pick, and its distance the covering radius. When none is left there, the level is
// lowered. The rows that are before it then catch up on what they have missed, and those that still
// are before it become active. Rows catch up in tiles of low precision; a distance is taken only
// where the bounds allow it to be below what the row knows. Most rows never come back, and miss
// most picks for ever.
//
// Distances are direct differences summed in float64, so the picks are those of a float64
// reference, on any number of threads.
class FarthestSearch {
  public:
    // The rows must stay where they are; the squared distances are copied.
    FarthestSearch(const FarthestParams& params, Isa isa, Precision precision);

    // Picks num_picks rows more, or fewer: it ends when none is left, and after a pick that leaves
    // no row farther than stop_squared_radius. Returns how many; of each, picks[j] is set, and
    // squared_radii[j] to the largest squared distance after it. Not to be called by two threads at
    // once, nor again after it has thrown.
    // Workspace: at most 128 MB, and 8 N bytes beside the 12 N that the search holds.
    std::int64_t advance(std::int64_t num_picks,
                         double stop_squared_radius,
                         std::int64_t* picks,
                         double* squared_radii,
                         Execution& execution);

    const FarthestCounters& counters() const {
        return counters_;
    }

  private:
    using RowList = std::vector<std::int32_t>;
    // Rows side by side, each on a 64-byte boundary.
    struct Gathered {
        AlignedFloats values;
        Rows rows;
    };

    std::int64_t num_seen() const {
        return static_cast<std::int64_t>(picks_.size());
    }
    double& value(std::int64_t row) {
        return values_[static_cast<std::size_t>(row)];
    }
    Candidate candidate(std::int64_t row) const {
        return {values_[static_cast<std::size_t>(row)], row};
    }
    // Whether a row may come nearer to a pick that it has not seen.
    bool is_stale(std::int64_t row) const {
        const auto r = static_cast<std::size_t>(row);
        return values_[r] > 0.0 && seen_[r] < static_cast<std::int32_t>(picks_.size());
    }

    void pick(std::int64_t row, Execution& execution);
    Candidate farthest(Execution& execution);
    Candidate first_active() const;

    void lower_level(Execution& execution);
    Candidate level_for(std::int64_t num_rows) const;
    RowList rows_before_level() const;
    void keep_first(RowList& rows);
    void activate(RowList rows, Execution& execution);
    void put_to_sleep();

    void catch_up(const RowList& rows, Execution& execution);
    void see(const RowList& rows,
             std::int64_t first_pick,
             std::int64_t end_pick,
             Execution& execution);
    void see_in_tiles(const RowList& rows,
                      const Rows& picks,
                      const PackedMemory& packed,
                      Execution& execution);
    void gather(const RowList& rows, Gathered& gathered, Execution& execution) const;

    Rows rows_;
    Isa isa_;
    Precision precision_;
    const Kernels& kernels_;
    const RowKernels& row_kernels_;
    std::vector<double> values_;      // [N], squared distances; -1 for picks
    std::vector<std::int32_t> seen_;  // [N], of how many picks
    std::vector<std::int64_t> picks_;
    Candidate next_;  // the next pick; before the first, row -1 if it is not known

    Candidate level_;
    RowList active_;                     // [M], ascending
    std::vector<double> active_values_;  // [M], as values_, which is not kept up meanwhile
    Gathered active_rows_;               // [M, D]
    Gathered waking_rows_;
    std::int64_t wanted_active_;                     // M is about this
    std::int64_t active_work_ = 0, level_work_ = 0;  // since and when the level was last lowered

    bool usable_ = true;
    FarthestCounters counters_;
};

}  // namespace pyfeat
