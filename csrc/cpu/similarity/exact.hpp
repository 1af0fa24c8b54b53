// SPDX-License-Identifier: Apache-2.0
// The ranking that counts: distances by direct differences in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "params.hpp"

namespace pyfeat {

// A row and how near it is: the squared distance, 1 - cos, or minus the product. Equal keys go to
// the lower row.
struct Ranked {
    double key;
    std::int64_t row;

    bool is_usable() const {
        return std::isfinite(key);
    }
    friend bool operator<(const Ranked& a, const Ranked& b) {
        return a.key < b.key || (a.key == b.key && a.row < b.row);
    }
};

// Distances of one query.
class ExactDistances {
  public:
    ExactDistances(const SearchParams& params, const Kernels& kernels)
        : params_(params),
          query_kernels_(kernels.row_kernels(params.queries.dtype)),
          row_kernels_(kernels.row_kernels(params.memory.dtype)),
          query_(static_cast<std::size_t>(params.memory.dim)) {}

    void begin(std::int64_t query) {
        const void* row = params_.queries.row(query);
        const std::int64_t dim = params_.memory.dim;
        const double scale = row_scale(query_kernels_.squared_norm(row, dim), params_.metric);
        query_kernels_.load(row, scale, dim, query_.data());
        zero_query_ = scale == 0.0;
    }

    // Smaller is nearer; NaN or infinite for a row that is not usable.
    double key(std::int64_t index) const {
        const void* row = params_.memory.row(index);
        const std::int64_t dim = params_.memory.dim;
        if (params_.metric == Metric::kInnerProduct) {
            return -row_kernels_.dot(query_.data(), row, dim);
        }
        if (params_.metric != Metric::kCosine) {
            return row_kernels_.squared_distance(query_.data(), row, 1.0, dim);
        }
        const double squared_norm = row_kernels_.squared_norm(row, dim);
        if (!is_usable(squared_norm)) {
            return std::numeric_limits<double>::quiet_NaN();
        }
        // 1 - cos = ||q/|q| - x/|x|||^2 / 2 keeps its digits for near-parallel vectors; the angle
        // to a zero vector counts as a right one.
        if (zero_query_ || squared_norm == 0.0) {
            return 1.0;
        }
        const double scale = row_scale(squared_norm, params_.metric);
        return 0.5 * row_kernels_.squared_distance(query_.data(), row, scale, dim);
    }

    // A row that will be asked for soon.
    void prefetch(std::int64_t index) const {
#if defined(__GNUC__)
        constexpr std::int64_t kLine = 64, kLargest = 8192;
        const auto* row = static_cast<const char*>(params_.memory.row(index));
        const std::int64_t bytes =
            std::min(kLargest, params_.memory.dim * bytes_of(params_.memory.dtype));
        for (std::int64_t at = 0; at < bytes; at += kLine) {
            __builtin_prefetch(row + at);
        }
#else
        (void)index;
#endif
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

  private:
    const SearchParams& params_;
    const RowKernels& query_kernels_;
    const RowKernels& row_kernels_;
    std::vector<double> query_;  // [D], normalised for cosine
    bool zero_query_ = false;
};

// The k nearest of the rows offered.
class Nearest {
  public:
    explicit Nearest(std::int64_t k) : k_(static_cast<std::size_t>(k)) {}

    void offer(const Ranked& row) {
        if (!row.is_usable() || (full_ && !(row < worst_))) {
            return;
        }
        best_.push_back(row);
        // Twice k entries between selections: a constant cost for each row offered.
        if (best_.size() >= 2 * k_) {
            keep_k();
        }
    }

    // At most k, nearest first.
    const std::vector<Ranked>& sorted() {
        if (best_.size() > k_) {
            keep_k();
        }
        std::sort(best_.begin(), best_.end());
        return best_;
    }

  private:
    void keep_k() {
        const auto nth = best_.begin() + static_cast<std::ptrdiff_t>(k_ - 1);
        std::nth_element(best_.begin(), nth, best_.end());
        worst_ = *nth;
        full_ = true;
        best_.resize(k_);
    }

    std::size_t k_;
    std::vector<Ranked> best_;
    bool full_ = false;
    Ranked worst_{};  // no row behind it can be among the k best
};

}  // namespace pyfeat
