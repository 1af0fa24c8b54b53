// SPDX-License-Identifier: Apache-2.0
// What a row's score can be at most if it is to come before another: one whose distance is known,
// or one whose score is bounded.
#pragma once

#include <algorithm>
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
        if (is_euclidean()) {
            const double reach = square_ * key;
            return with_spare(query, 0.5 * (reach - query.squared_norm), reach);
        }
        const double least = square_ * (metric_ == Metric::kCosine ? 1.0 - key : -key);
        return with_spare(query, query.mean_product + mean_ - least, std::abs(least));
    }

    // The largest score of a row whose key may come out no greater than that of a row with a score
    // of at most `score`, rounded up.
    float beside(const QueryTerms& query, double score) const {
        return with_spare(query,
                          score,
                          is_euclidean() ? std::max(2.0 * score + query.squared_norm, 0.0)
                                         : std::abs(query.mean_product + mean_ - score));
    }

  private:
    bool is_euclidean() const {
        return metric_ == Metric::kEuclidean || metric_ == Metric::kSquaredEuclidean;
    }

    // `key` is that of the score, in the units of the frame.
    float with_spare(const QueryTerms& query, double score, double key) const {
        const double magnitude =
            is_euclidean() ? key + query.squared_norm
                           : std::sqrt(query.squared_norm * mean_) + mean_ + key + square_;
        return round_up(score + spare_ * magnitude);
    }

    Metric metric_;
    double square_, spare_;
    double mean_ = 0.0;  // ||m'||^2
};

}  // namespace pyfeat
