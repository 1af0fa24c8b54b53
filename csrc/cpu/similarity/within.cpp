// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/within.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/similarity/exact.hpp"
#include "cpu/similarity/limits.hpp"
#include "cpu/similarity/sweep.hpp"

namespace pyfeat {
namespace {

// Rows whose score may be at or below a threshold that does not move. Collector of a Sweep.
class Candidates {
  public:
    explicit Candidates(std::vector<float> thresholds)
        : thresholds_(std::move(thresholds)), rows_(thresholds_.size()) {}

    const float* thresholds() const {
        return thresholds_.data();
    }
    void offer(std::int64_t slot, const ScoreRange& score, std::int64_t row) {
        const auto s = static_cast<std::size_t>(slot);
        if (score.lower <= thresholds_[s]) {
            rows_[s].push_back(row);
        }
    }
    const std::vector<std::int64_t>& rows(std::int64_t slot) const {
        return rows_[static_cast<std::size_t>(slot)];
    }

  private:
    std::vector<float> thresholds_;                // [slots]
    std::vector<std::vector<std::int64_t>> rows_;  // [slots]
};

bool is_within(const RangeParams& params, double distance) {
    return params.metric == Metric::kInnerProduct ? distance >= params.radius
                                                  : distance <= params.radius;
}

class RangeSearch {
  public:
    RangeSearch(const RangeParams& params, const Kernels& kernels, Execution& execution)
        : params_(params),
          kernels_(kernels),
          execution_(execution),
          found_(static_cast<std::size_t>(params.queries.num_rows)) {}

    // Returns the queries that tiles are no use for.
    std::vector<std::int64_t> search_tiles(MemorySearch& search,
                                           Precision precision,
                                           const Frame& frame,
                                           const std::vector<std::int64_t>& ids,
                                           SearchCounters& counters) {
        Sweep<Candidates> sweep(
            params_,
            Engine{&kernels_, precision, params_.bound_scale},
            execution_,
            frame,
            ids,
            [&](const std::vector<std::int64_t>&, const PackedQueries& queries, std::int64_t) {
                return candidates(frame, queries);
            });
        search.for_each_chunk(precision, [&](const PackedRows& chunk) { sweep.search(chunk); });
        std::atomic<std::int64_t> reranked{0};
        execution_.parallel_for(static_cast<std::int64_t>(ids.size()), [&](std::int64_t slot, int) {
            keep_within(ids[static_cast<std::size_t>(slot)], [&](auto use) {
                for (const Candidates& slice : sweep.slices()) {
                    reranked += static_cast<std::int64_t>(slice.rows(slot).size());
                    for (const std::int64_t row : slice.rows(slot)) {
                        use(row);
                    }
                }
            });
        });
        counters.reranked += reranked;
        std::vector<std::int64_t> without;
        for (std::size_t s = 0; s < ids.size(); ++s) {
            if (sweep.beyond(static_cast<std::int64_t>(s))) {
                without.push_back(ids[s]);
            }
        }
        return without;
    }

    void search_exhaustively(const std::vector<std::int64_t>& ids) {
        execution_.parallel_for(static_cast<std::int64_t>(ids.size()), [&](std::int64_t task, int) {
            const std::int64_t query = ids[static_cast<std::size_t>(task)];
            keep_within(query, [&](auto use) {
                for (std::int64_t row = 0; row < params_.memory.num_rows; ++row) {
                    if (params_.mask.allows(query, row)) {
                        use(row);
                    }
                }
            });
        });
    }

    RangeResult result() const {
        RangeResult result;
        result.offsets.push_back(0);
        for (const auto& rows : found_) {
            for (const Ranked& found : rows) {
                result.distances.push_back(found.key);
                result.indices.push_back(found.row);
            }
            result.offsets.push_back(static_cast<std::int64_t>(result.indices.size()));
        }
        return result;
    }

  private:
    Candidates candidates(const Frame& frame, const PackedQueries& queries) const {
        const ScoreLimits limits(frame, params_.memory.dim);
        std::vector<float> thresholds(queries.beyond.size(),
                                      -std::numeric_limits<float>::infinity());
        for (std::size_t slot = 0; slot < thresholds.size(); ++slot) {
            if (queries.beyond[slot] == 0 && key_of_radius() >= least_key()) {
                thresholds[slot] = limits.at(queries.terms[slot], key_of_radius());
            }
        }
        return Candidates(std::move(thresholds));
    }

    double key_of_radius() const {
        switch (params_.metric) {
            case Metric::kEuclidean:
                return params_.radius < 0.0 ? -1.0 : params_.radius * params_.radius;
            case Metric::kInnerProduct:
                return -params_.radius;
            default:
                return params_.radius;
        }
    }
    double least_key() const {
        return params_.metric == Metric::kInnerProduct ? -std::numeric_limits<double>::infinity()
                                                       : 0.0;
    }

    // Of the rows that for_each_row gives, those within the radius by float64 distances.
    template <typename ForEachRow>
    void keep_within(std::int64_t query, ForEachRow for_each_row) {
        ExactDistances exact(params_, kernels_);
        std::vector<Ranked>& kept = found_[static_cast<std::size_t>(query)];
        exact.begin(query);
        kept.clear();
        for_each_row([&](std::int64_t row) {
            const double key = exact.key(row);
            if (std::isfinite(key) && is_within(params_, exact.distance(key))) {
                kept.push_back({key, row});
            }
        });
        std::sort(kept.begin(), kept.end());
        for (Ranked& found : kept) {
            found.key = exact.distance(found.key);
        }
    }

    const RangeParams& params_;
    const Kernels& kernels_;
    Execution& execution_;
    std::vector<std::vector<Ranked>> found_;  // [Q] with distances for keys, nearest first
};

}  // namespace

RangeResult within_cpu(const RangeParams& params,
                       const PackedMemory* packed,
                       Isa isa,
                       Precision precision,
                       Execution& execution,
                       SearchCounters& counters) {
    check_search(params, packed);
    MemorySearch search(params, packed, isa, precision, execution);
    const Kernels& kernels = search.kernels();
    RangeSearch range(params, kernels, execution);
    const bool tiles = params.memory.num_rows > 0 && fits_tiles(params.memory, kernels);
    if (!tiles) {
        check_memory(params, kernels, execution);
    }
    constexpr std::int64_t kBytesPerQuery = 256;  // before its candidates
    search.run(
        kBytesPerQuery,
        tiles,
        counters,
        [&](Precision with, const Frame& frame, const std::vector<std::int64_t>& ids) {
            return range.search_tiles(search, with, frame, ids, counters);
        },
        [&](const std::vector<std::int64_t>& ids) { range.search_exhaustively(ids); });
    return range.result();
}

}  // namespace pyfeat
