// SPDX-License-Identifier: Apache-2.0
// The ranking that counts: distances by direct differences in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Distances of one query in float64, and the k best of them.
class Exact {
  public:
    Exact(const KnnParams& params, const Kernels& kernels)
        : params_(params), kernels_(kernels), query_(static_cast<std::size_t>(params.memory.dim)) {}

    void begin(std::int64_t query) {
        const float* row = params_.queries.row(query);
        const double scale = row_scale(row, params_.memory.dim, params_.metric, kernels_);
        for (std::size_t d = 0; d < query_.size(); ++d) {
            query_[d] = static_cast<double>(row[d]) * scale;
        }
        zero_query_ = scale == 0.0;
        best_.clear();
        worst_ = {std::numeric_limits<double>::infinity(),
                  std::numeric_limits<std::int64_t>::max()};
    }

    void offer(std::int64_t row) {
        const Entry entry{key(row), row};
        if (!(entry < worst_)) {
            return;
        }
        best_.push_back(entry);
        // Twice k entries between selections: a constant cost for each row offered.
        if (static_cast<std::int64_t>(best_.size()) >= 2 * params_.k) {
            keep_k();
        }
    }

    void finish(std::int64_t query) {
        const std::int64_t k = params_.k;
        if (static_cast<std::int64_t>(best_.size()) > k) {
            keep_k();
        }
        std::sort(best_.begin(), best_.end());
        for (std::int64_t j = 0; j < k; ++j) {
            const Entry& entry = best_[static_cast<std::size_t>(j)];
            params_.distances[query * k + j] = static_cast<float>(distance(entry.first));
            params_.indices[query * k + j] = entry.second;
        }
    }

  private:
    using Entry = std::pair<double, std::int64_t>;  // key, row: equal keys go to the lower row

    // Smaller is nearer.
    double key(std::int64_t index) const {
        const float* row = params_.memory.row(index);
        const std::int64_t dim = params_.memory.dim;
        if (params_.metric == Metric::kInnerProduct) {
            return -kernels_.dot(query_.data(), row, dim);
        }
        const double scale = row_scale(row, dim, params_.metric, kernels_);
        if (params_.metric == Metric::kCosine) {
            // 1 - cos = ||q/|q| - x/|x|||^2 / 2 keeps its digits for near-parallel vectors; the
            // angle to a zero vector counts as a right one.
            if (zero_query_ || scale == 0.0) {
                return 1.0;
            }
            return 0.5 * kernels_.squared_distance(query_.data(), row, scale, dim);
        }
        return kernels_.squared_distance(query_.data(), row, scale, dim);
    }

    double distance(double key) const {
        switch (params_.metric) {
            case Metric::kEuclidean:
                return std::sqrt(key);
            case Metric::kInnerProduct:
                return -key;
            default:
                return key;
        }
    }

    void keep_k() {
        const auto nth = best_.begin() + static_cast<std::ptrdiff_t>(params_.k - 1);
        std::nth_element(best_.begin(), nth, best_.end());
        worst_ = *nth;
        best_.resize(static_cast<std::size_t>(params_.k));
    }

    const KnnParams& params_;
    const Kernels& kernels_;
    std::vector<double> query_;  // [D], normalised for cosine
    bool zero_query_ = false;
    std::vector<Entry> best_;
    Entry worst_;  // no row behind it can be among the k best
};

// Every row against the given queries in float64.
inline void search_exhaustively(const KnnParams& params,
                                const Kernels& kernels,
                                Execution& execution,
                                const std::vector<std::int64_t>& queries) {
    constexpr std::int64_t kRowsPerPoll = 4096;
    execution.parallel_for(static_cast<std::int64_t>(queries.size()), [&](std::int64_t task, int) {
        const std::int64_t query = queries[static_cast<std::size_t>(task)];
        Exact exact(params, kernels);
        exact.begin(query);
        for (std::int64_t row = 0; row < params.memory.num_rows; ++row) {
            if (row % kRowsPerPoll == 0 && execution.stop_requested()) {
                return;
            }
            exact.offer(row);
        }
        exact.finish(query);
    });
}

}  // namespace pyfeat
