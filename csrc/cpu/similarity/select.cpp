// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/select.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"

namespace pyfeat {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Half for packed memory, half for packed queries and their shortlists: under 256 MB in all.
constexpr std::int64_t kMemoryBudgetBytes = 112LL << 20;
constexpr std::int64_t kQueryBudgetBytes = 96LL << 20;
constexpr std::int64_t kLargestShortlistK = 1024;
constexpr std::int64_t kLargestTileDim = 1LL << 20;  // D u < 1/2 with room, as the bound assumes
constexpr std::int64_t kQueryPanelsPerTask = 20;

// float32 at or above / at or below a float64 value: the nearest float is off by at most 2^-24 of
// the value, or 2^-150 where it underflows.
float round_up(double value) {
    return static_cast<float>(value + std::abs(value) * 0x1p-23 + 0x1p-149);
}
float round_down(double value) {
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
          thresholds_(to_size(num_queries), kInfinity),
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
                threshold = -kInfinity;  // nothing more is marked for this query
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
void search_exhaustively(const KnnParams& params,
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

// One range of queries against the whole memory, in tiles.
class TileSearch {
  public:
    TileSearch(const KnnParams& params,
               const Kernels& kernels,
               Execution& execution,
               const Frame& frame,
               std::int64_t first_query,
               std::int64_t num_queries)
        : params_(params),
          kernels_(kernels),
          execution_(execution),
          first_query_(first_query),
          queries_(
              pack_queries(params.queries, first_query, num_queries, frame, kernels, execution)) {
        // Tasks are ranges of queries; when these are too few to feed the threads, each is cut
        // into slices of the memory with shortlists of their own, joined at the end.
        const std::int64_t wanted = 4LL * execution.num_threads();
        panels_per_task_ =
            std::clamp<std::int64_t>(queries_.num_panels / wanted, 1, kQueryPanelsPerTask);
        num_groups_ = (queries_.num_panels + panels_per_task_ - 1) / panels_per_task_;
        const std::int64_t num_slices =
            execution.num_threads() == 1 ? 1 : (wanted + num_groups_ - 1) / num_groups_;
        for (std::int64_t s = 0; s < num_slices; ++s) {
            slices_.emplace_back(num_queries, params.k);
        }
    }

    void search(const PackedRows& memory) {
        const auto num_slices = static_cast<std::int64_t>(slices_.size());
        execution_.parallel_for(num_groups_ * num_slices, [&](std::int64_t task, int) {
            const std::int64_t group = task / num_slices, slice = task % num_slices;
            search_slice(memory,
                         group * panels_per_task_,
                         std::min(queries_.num_panels, (group + 1) * panels_per_task_),
                         memory.num_panels * slice / num_slices,
                         memory.num_panels * (slice + 1) / num_slices,
                         slices_[static_cast<std::size_t>(slice)]);
        });
    }

    // Ranks the shortlists by float64 distances; returns the queries that have none.
    std::vector<std::int64_t> finish(KnnCounters& counters) {
        constexpr std::int64_t kQueriesPerTask = 64;
        const std::int64_t num_tasks =
            (queries_.num_queries + kQueriesPerTask - 1) / kQueriesPerTask;
        std::vector<char> failed(static_cast<std::size_t>(queries_.num_queries), 0);
        std::atomic<std::int64_t> reranked{0};
        execution_.parallel_for(num_tasks, [&](std::int64_t task, int) {
            Exact exact(params_, kernels_);
            std::vector<float> uppers;
            std::vector<std::int64_t> rows;
            const std::int64_t end = std::min(queries_.num_queries, (task + 1) * kQueriesPerTask);
            for (std::int64_t query = task * kQueriesPerTask; query < end; ++query) {
                if (!gather(query, uppers, rows)) {
                    failed[static_cast<std::size_t>(query)] = 1;
                    continue;
                }
                reranked += static_cast<std::int64_t>(rows.size());
                exact.begin(first_query_ + query);
                for (const std::int64_t row : rows) {
                    exact.offer(row);
                }
                exact.finish(first_query_ + query);
            }
        });
        counters.reranked += reranked;
        std::vector<std::int64_t> without;
        for (std::int64_t query = 0; query < queries_.num_queries; ++query) {
            if (failed[static_cast<std::size_t>(query)] != 0) {
                without.push_back(first_query_ + query);
            }
        }
        return without;
    }

  private:
    // Rows of all slices that may be among the k nearest of `query`; false if a list overflowed.
    bool gather(std::int64_t query,
                std::vector<float>& uppers,
                std::vector<std::int64_t>& rows) const {
        if (!searchable(query)) {
            return false;
        }
        uppers.clear();
        rows.clear();
        for (const Shortlists& slice : slices_) {
            if (slice.overflowed(query)) {
                return false;
            }
            slice.append_uppers(query, uppers);
        }
        const auto kth = uppers.begin() + static_cast<std::ptrdiff_t>(params_.k - 1);
        std::nth_element(uppers.begin(), kth, uppers.end());
        for (const Shortlists& slice : slices_) {
            slice.append_rows(query, *kth, rows);
        }
        return true;
    }

    bool searchable(std::int64_t query) const {
        return queries_.norms[static_cast<std::size_t>(query)] <= kLargestQueryNorm;
    }

    // Half of the second-level cache holds a block of memory while the queries pass over it; the
    // other half serves the query panel and the stream that fetches the next one.
    std::int64_t panels_per_block(const PackedRows& memory) const {
        const std::int64_t panel_bytes = std::max<std::int64_t>(4 * memory.panel_words, 1);
        return std::max<std::int64_t>(second_level_cache_bytes() / 2 / panel_bytes, 1);
    }

    void search_slice(const PackedRows& memory,
                      std::int64_t first_query_panel,
                      std::int64_t end_query_panel,
                      std::int64_t first_panel,
                      std::int64_t end_panel,
                      Shortlists& shortlists) {
        const std::int64_t block = panels_per_block(memory);
        for (std::int64_t begin = first_panel; begin < end_panel; begin += block) {
            const std::int64_t end = std::min(end_panel, begin + block);
            for (std::int64_t qp = first_query_panel; qp < end_query_panel; ++qp) {
                if (execution_.stop_requested()) {
                    return;
                }
                for (std::int64_t mp = begin; mp < end; ++mp) {
                    search_tile(memory, qp, mp, shortlists);
                }
            }
        }
    }

    void search_tile(const PackedRows& memory,
                     std::int64_t query_panel,
                     std::int64_t memory_panel,
                     Shortlists& shortlists) {
        const int num_rows = kernels_.tile_rows, num_queries = kernels_.tile_queries;
        alignas(64) float scores[kMaxTileQueries * kMaxTileRows];
        float limits[kMaxTileQueries];
        double errors[kMaxTileQueries];
        std::uint32_t marks[kMaxTileQueries];

        const PanelBounds& bounds = memory.bounds[static_cast<std::size_t>(memory_panel)];
        const std::int64_t base = query_panel * num_queries;
        for (int r = 0; r < num_queries; ++r) {
            const auto slot = static_cast<std::size_t>(base + r);
            const bool live = base + r < queries_.num_queries && searchable(base + r);
            errors[r] = queries_.norms[slot] * bounds.reach +
                        queries_.residuals[slot] * bounds.norm + bounds.slack;
            limits[r] = live ? round_up(shortlists.threshold(base + r) + errors[r]) : -kInfinity;
        }
        kernels_.tile_product(
            params_.memory.dim, queries_.panel(query_panel), memory.panel(memory_panel), scores);
        const float* row_terms = memory.row_terms.data() + memory_panel * num_rows;
        if (!kernels_.mark_scores(scores, row_terms, limits, marks)) {
            return;
        }
        const std::int64_t first_row = memory.first_row + memory_panel * num_rows;
        for (int r = 0; r < num_queries; ++r) {
            for (int c = 0; c < num_rows; ++c) {
                if (((marks[r] >> c) & 1U) != 0) {
                    const double score = scores[r * num_rows + c];
                    shortlists.offer(base + r,
                                     round_down(score - errors[r]),
                                     round_up(score + errors[r]),
                                     first_row + c);
                }
            }
        }
    }

    const KnnParams& params_;
    const Kernels& kernels_;
    Execution& execution_;
    std::int64_t first_query_;
    PackedQueries queries_;
    std::int64_t panels_per_task_ = 1, num_groups_ = 1;
    std::vector<Shortlists> slices_;
};

// As even as can be, in multiples of `multiple`, none above `largest`.
std::int64_t even_chunk(std::int64_t total, std::int64_t largest, std::int64_t multiple) {
    largest = std::max(largest / multiple * multiple, multiple);
    const std::int64_t count = (total + largest - 1) / largest;
    const std::int64_t chunk = (total + count - 1) / count;
    return (chunk + multiple - 1) / multiple * multiple;
}

}  // namespace

KnnCounters knn_cpu(const KnnParams& params, Isa isa, Execution& execution) {
    const Rows& queries = params.queries;
    const Rows& memory = params.memory;
    PYFEAT_CHECK(queries.dim == memory.dim, "queries and memory must have the same width");
    PYFEAT_CHECK(params.k >= 1 && params.k <= memory.num_rows, "k must be in [1, N]");
    KnnCounters counters;
    if (queries.num_rows == 0) {
        return counters;
    }

    const Kernels& kernels = kernels_for(isa);
    check_finite(queries, "knn: queries", kernels, execution);
    check_finite(memory, "knn: memory", kernels, execution);

    // With this many neighbours the float64 distances cost more than the tiles would save.
    if (params.k > kLargestShortlistK || 4 * params.k > memory.num_rows ||
        memory.dim > kLargestTileDim) {
        std::vector<std::int64_t> all(static_cast<std::size_t>(queries.num_rows));
        std::iota(all.begin(), all.end(), 0);
        search_exhaustively(params, kernels, execution, all);
        return counters;
    }

    const Frame frame = choose_frame(memory, params.metric, kernels, execution);
    const std::int64_t row_bytes = std::max<std::int64_t>(4 * kernels.words(memory.dim), 1);
    const std::int64_t query_chunk =
        even_chunk(queries.num_rows,
                   kQueryBudgetBytes / (row_bytes + Shortlists::bytes_per_query(params.k)),
                   kernels.tile_queries);
    const std::int64_t memory_chunk =
        even_chunk(memory.num_rows, kMemoryBudgetBytes / row_bytes, kernels.tile_rows);

    for (std::int64_t first = 0; first < queries.num_rows; first += query_chunk) {
        const std::int64_t count = std::min(query_chunk, queries.num_rows - first);
        TileSearch search(params, kernels, execution, frame, first, count);
        for (std::int64_t row = 0; row < memory.num_rows; row += memory_chunk) {
            search.search(pack_memory(memory,
                                      row,
                                      std::min(memory_chunk, memory.num_rows - row),
                                      frame,
                                      kernels,
                                      execution));
        }
        const std::vector<std::int64_t> overflowed = search.finish(counters);
        search_exhaustively(params, kernels, execution, overflowed);
        counters.exhaustive += static_cast<std::int64_t>(overflowed.size());
    }
    return counters;
}

}  // namespace pyfeat
