// SPDX-License-Identifier: Apache-2.0
// From distances back to scores: what a row's score can be at most if its distance is no more than
// one that is known exactly.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/similarity/pack.hpp"
#include "params.hpp"

namespace pyfeat {

class ScoreLimits {
  public:
    ScoreLimits(const Frame& frame, std::int64_t dim)
        : metric_(frame.metric),
          square_(frame.scale * frame.scale),
          spare_((static_cast<double>(dim) + 64.0) * 0x1p-51) {
        for (const double value : frame.mean) {
            mean_ += value * value * square_;
        }
    }

    // The largest score of a row whose key (the squared distance, 1 - cos, or minus the product) is
    // at most `key`, rounded up. With q' and m' the transformed query and mean, s the scale:
    //   (s distance)^2 = 2 score + ||q'||^2          s^2 q.x = q'.m' + ||m'||^2 - score
    // Sums of D terms in float64 are off by at most D 2^-53 of the sum of their magnitudes, and so
    // is the key; a few times that is added.
    float at(const QueryTerms& query, double key) const {
        if (metric_ == Metric::kEuclidean || metric_ == Metric::kSquaredEuclidean) {
            const double reach = square_ * key;
            return round_up(0.5 * (reach - query.squared_norm) +
                            spare_ * (reach + query.squared_norm));
        }
        const double least = square_ * (metric_ == Metric::kCosine ? 1.0 - key : -key);
        const double magnitude =
            std::sqrt(query.squared_norm * mean_) + mean_ + std::abs(least) + square_;
        return round_up(query.mean_product + mean_ - least + spare_ * magnitude);
    }

  private:
    Metric metric_;
    double square_, spare_;
    double mean_ = 0.0;  // ||m'||^2
};

}  // namespace pyfeat
