// SPDX-License-Identifier: Apache-2.0
// The rows that may still be among the k nearest of a query, by bounds on their scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace pyfeat {

// float32 at or above / at or below a float64 value: the nearest float is off by at most 2^-24 of
// the value, or 2^-150 where it underflows.
inline float round_up(double value) {
    return static_cast<float>(value + std::abs(value) * 0x1p-23 + 0x1p-149);
}
inline float round_down(double value) {
    return static_cast<float>(value - std::abs(value) * 0x1p-23 - 0x1p-149);
}

// The rows that may still be among the k nearest, for each of a range of queries. A row's score
// lies in [lower, upper]; `threshold` is the k-th smallest upper so far, so a row whose lower
// exceeds it cannot win.
class Shortlists {
  public:
    Shortlists(std::int64_t num_queries, std::int64_t k)
        : k_(k),
          capacity_(capacity_for(k)),
          thresholds_(to_size(num_queries), std::numeric_limits<float>::infinity()),
          num_uppers_(to_size(num_queries), 0),
          num_candidates_(to_size(num_queries), 0),
          uppers_(to_size(num_queries * k)),
          candidates_(to_size(num_queries * capacity_)) {}

    static std::int64_t capacity_for(std::int64_t k) {
        return 64 + 4 * k;
    }
    static std::int64_t bytes_per_query(std::int64_t k) {
        return 4 * k + 16 * capacity_for(k) + 12;
    }

    float threshold(std::int64_t query) const {
        return thresholds_[to_size(query)];
    }

    bool overflowed(std::int64_t query) const {
        return num_candidates_[to_size(query)] < 0;
    }

    void offer(std::int64_t query, float lower, float upper, std::int64_t row) {
        const std::size_t q = to_size(query);
        float& threshold = thresholds_[q];
        std::int32_t& count = num_candidates_[q];
        if (lower > threshold || count < 0) {
            return;
        }
        Candidate* candidates = &candidates_[to_size(query * capacity_)];
        if (count == capacity_) {
            count = static_cast<std::int32_t>(
                std::remove_if(candidates,
                               candidates + count,
                               [=](const Candidate& c) { return c.lower > threshold; }) -
                candidates);
            if (count > capacity_ - capacity_ / 4) {
                count = -1;
                threshold = -std::numeric_limits<float>::infinity();  // nothing more is marked for
                                                                      // this query
                return;
            }
        }
        candidates[count++] = {lower, row};

        float* heap = &uppers_[to_size(query * k_)];
        std::int32_t& held = num_uppers_[q];
        if (held < k_) {
            heap[held++] = upper;
            std::push_heap(heap, heap + held);
        } else if (upper < heap[0]) {
            std::pop_heap(heap, heap + k_);
            heap[k_ - 1] = upper;
            std::push_heap(heap, heap + k_);
        }
        if (held == k_) {
            threshold = heap[0];
        }
    }

    void append_uppers(std::int64_t query, std::vector<float>& uppers) const {
        const float* heap = &uppers_[to_size(query * k_)];
        uppers.insert(uppers.end(), heap, heap + num_uppers_[to_size(query)]);
    }

    void append_rows(std::int64_t query, float threshold, std::vector<std::int64_t>& rows) const {
        const Candidate* candidates = &candidates_[to_size(query * capacity_)];
        for (std::int32_t i = 0; i < num_candidates_[to_size(query)]; ++i) {
            if (candidates[i].lower <= threshold) {
                rows.push_back(candidates[i].row);
            }
        }
    }

  private:
    struct Candidate {
        float lower;
        std::int64_t row;
    };
    static std::size_t to_size(std::int64_t value) {
        return static_cast<std::size_t>(value);
    }

    std::int64_t k_, capacity_;
    std::vector<float> thresholds_;
    std::vector<std::int32_t> num_uppers_, num_candidates_;
    std::vector<float> uppers_;          // [Q, k], a max-heap each
    std::vector<Candidate> candidates_;  // [Q, capacity]
};

}  // namespace pyfeat
