// SPDX-License-Identifier: Apache-2.0
// The k nearest rows of every query, found by bounds on their scores first and by float64 distances
// where the bounds do not decide.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/similarity/exact.hpp"
#include "cpu/similarity/limits.hpp"
#include "cpu/similarity/pack.hpp"

namespace pyfeat {

// Rows whose lowest possible score is no more than the k-th of the highest possible ones so far
// wait in a list; when it is full, their distances are taken, the lowest first, until the next
// one's lowest score is beyond the k-th nearest. Collector of a Sweep.
class Shortlists {
  public:
    // A query that has taken more than `patience` distances gives up: its bounds are too coarse.
    Shortlists(const SearchParams& params,
               const Kernels& kernels,
               const ScoreLimits& limits,
               const std::vector<std::int64_t>& ids,
               const PackedQueries& queries,
               std::int64_t k,
               std::int64_t patience)
        : params_(params),
          kernels_(kernels),
          limits_(limits),
          ids_(ids),
          queries_(queries),
          k_(k),
          capacity_(capacity_for(k)),
          patience_(patience),
          thresholds_(queries.beyond.size(), std::numeric_limits<float>::infinity()),
          num_waiting_(queries.beyond.size(), 0),
          num_ranked_(queries.beyond.size(), 0),
          num_taken_(queries.beyond.size(), 0),
          num_uppers_(queries.beyond.size(), 0),
          uppers_(queries.beyond.size() * to_size(k)),
          waiting_(queries.beyond.size() * to_size(capacity_)),
          nearest_(queries.beyond.size() * to_size(k)) {
        for (std::size_t slot = 0; slot < queries.beyond.size(); ++slot) {
            if (queries.beyond[slot] != 0) {
                give_up(slot);
            }
        }
    }

    static std::int64_t capacity_for(std::int64_t k) {
        return 128 + 4 * k;
    }
    static std::int64_t bytes_per_query(std::int64_t k) {
        return 20 * k + 16 * capacity_for(k) + 24;
    }

    const float* thresholds() const {
        return thresholds_.data();
    }
    bool gave_up(std::int64_t slot) const {
        return num_waiting_[to_size(slot)] < 0;
    }
    std::int64_t num_taken(std::int64_t slot) const {
        return num_taken_[to_size(slot)];
    }

    void offer(std::int64_t slot, const ScoreRange& score, std::int64_t row) {
        const std::size_t s = to_size(slot);
        std::int32_t& count = num_waiting_[s];
        if (score.lower > thresholds_[s] || count < 0) {
            return;
        }
        waiting_[to_size(slot * capacity_ + count)] = {score.lower, row};
        take_upper(slot, score.upper);
        if (++count == capacity_) {
            ExactDistances exact(params_, kernels_);
            settle(slot, exact);
            if (num_taken_[s] > patience_) {
                give_up(s);
            }
        }
    }

    // Takes the distances of the rows that wait and may win; none waits any more.
    void settle(std::int64_t slot, ExactDistances& exact) {
        const std::size_t s = to_size(slot);
        Waiting* waiting = &waiting_[to_size(slot * capacity_)];
        Ranked* nearest = &nearest_[to_size(slot * k_)];
        std::int32_t& held = num_ranked_[s];
        const std::int32_t count = num_waiting_[s];
        // Few of those that wait are looked at, so they are put in order only as far as that.
        const auto behind = [](const Waiting& a, const Waiting& b) {
            return a.lower > b.lower || (a.lower == b.lower && a.row > b.row);
        };
        Waiting* end = std::partition(
            waiting, waiting + count, [&](const Waiting& w) { return w.lower <= thresholds_[s]; });
        std::make_heap(waiting, end, behind);
        // Rows lie anywhere in the memory: waiting for one at a time would be most of the time.
        const auto prefetch = [&](std::ptrdiff_t first, std::ptrdiff_t last) {
            for (std::ptrdiff_t i = first; i <= last && i < end - waiting; ++i) {
                exact.prefetch(waiting[i].row);
            }
        };
        prefetch(0, 2);
        exact.begin(ids_[s]);
        while (end != waiting && waiting->lower <= thresholds_[s]) {
            std::pop_heap(waiting, end, behind);
            const Waiting* next = --end;
            prefetch(1, 2);  // one of them comes after the first
            ++num_taken_[s];
            const Ranked found{exact.key(next->row), next->row};
            if (!found.is_usable()) {
                continue;
            }
            if (held < k_) {
                nearest[held++] = found;
                std::push_heap(nearest, nearest + held);
            } else if (found < nearest[0]) {
                std::pop_heap(nearest, nearest + held);
                nearest[held - 1] = found;
                std::push_heap(nearest, nearest + held);
            }
            if (held == k_) {
                lower_threshold(slot, nearest[0].key);
            }
        }
        num_waiting_[s] = 0;
    }

    // Another list of the same queries has found k rows with keys of at most `key`.
    void lower_threshold(std::int64_t slot, double key) {
        const std::size_t s = to_size(slot);
        thresholds_[s] = std::min(thresholds_[s], limits_.at(queries_.terms[s], key));
    }

    // The nearest so far, in no order.
    void append_nearest(std::int64_t slot, std::vector<Ranked>& nearest) const {
        const Ranked* first = &nearest_[to_size(slot * k_)];
        nearest.insert(nearest.end(), first, first + num_ranked_[to_size(slot)]);
    }

  private:
    struct Waiting {
        float lower;
        std::int64_t row;
    };
    static std::size_t to_size(std::int64_t value) {
        return static_cast<std::size_t>(value);
    }

    // k rows have scores of at most the largest of the k least upper bounds.
    void take_upper(std::int64_t slot, float upper) {
        const std::size_t s = to_size(slot);
        if (!(upper < thresholds_[s])) {
            return;  // it lowers nothing: the threshold is no more than the k-th of them
        }
        float* uppers = &uppers_[to_size(slot * k_)];
        std::int32_t& held = num_uppers_[s];
        if (held < k_) {
            uppers[held++] = upper;
            std::push_heap(uppers, uppers + held);
        } else if (upper < uppers[0]) {
            std::pop_heap(uppers, uppers + held);
            uppers[held - 1] = upper;
            std::push_heap(uppers, uppers + held);
        }
        if (held == k_) {
            const float limit = limits_.beside(queries_.terms[s], uppers[0]);
            thresholds_[s] = std::min(thresholds_[s], limit);
        }
    }

    // Nothing more is marked for this query.
    void give_up(std::size_t slot) {
        num_waiting_[slot] = -1;
        thresholds_[slot] = -std::numeric_limits<float>::infinity();
    }

    const SearchParams& params_;
    const Kernels& kernels_;
    const ScoreLimits& limits_;
    const std::vector<std::int64_t>& ids_;  // [slots] which queries
    const PackedQueries& queries_;
    std::int64_t k_, capacity_, patience_;
    std::vector<float> thresholds_;  // [slots]
    std::vector<std::int32_t> num_waiting_, num_ranked_;
    std::vector<std::int64_t> num_taken_;
    std::vector<std::int32_t> num_uppers_;
    std::vector<float> uppers_;     // [slots, k], a max-heap each
    std::vector<Waiting> waiting_;  // [slots, capacity]
    std::vector<Ranked> nearest_;   // [slots, k], a max-heap each
};

}  // namespace pyfeat
