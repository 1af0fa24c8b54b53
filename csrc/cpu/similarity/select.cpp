// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/select.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cpu/similarity/exact.hpp"
#include "cpu/similarity/shortlist.hpp"
#include "cpu/similarity/sweep.hpp"

namespace pyfeat {
namespace {

// With many neighbours the float64 distances cost more than the tiles would save, and for few
// queries to pack the memory costs more than all distances.
bool worth_tiles(const KnnParams& params, const PackedMemory* packed, const Kernels& kernels) {
    constexpr std::int64_t kLargestShortlistK = 1024, kFewQueries = 6;
    return params.k <= kLargestShortlistK && 4 * params.k <= params.memory.num_rows &&
           (packed != nullptr || params.queries.num_rows > kFewQueries) &&
           fits_tiles(params.memory, kernels);
}

void write(const KnnParams& params,
           std::int64_t query,
           const ExactDistances& exact,
           const std::vector<Ranked>& nearest) {
    const double none = params.metric == Metric::kInnerProduct
                            ? -std::numeric_limits<double>::infinity()
                            : std::numeric_limits<double>::infinity();
    for (std::int64_t j = 0; j < params.k; ++j) {
        const bool found = j < static_cast<std::int64_t>(nearest.size());
        const std::size_t at = static_cast<std::size_t>(j);
        const double distance = found ? exact.distance(nearest[at].key) : none;
        const std::int64_t to = query * params.k + j;
        if (params.distance_dtype == Dtype::kFloat64) {
            static_cast<double*>(params.distances)[to] = distance;
        } else {
            static_cast<float*>(params.distances)[to] = static_cast<float>(distance);
        }
        params.indices[to] = found ? nearest[at].row : -1;
    }
}

// Joins what the slices have found for one query; false if one of them gave up.
bool join(std::vector<Shortlists>& slices,
          std::int64_t slot,
          std::int64_t k,
          ExactDistances& exact,
          Nearest& nearest) {
    std::vector<Ranked> found;
    for (Shortlists& slice : slices) {
        if (slice.gave_up(slot)) {
            return false;
        }
        slice.append_nearest(slot, found);
    }
    if (static_cast<std::int64_t>(found.size()) >= k) {
        const auto kth = found.begin() + static_cast<std::ptrdiff_t>(k - 1);
        std::nth_element(found.begin(), kth, found.end());
        for (Shortlists& slice : slices) {
            slice.lower_threshold(slot, kth->key);
        }
    }
    found.clear();
    for (Shortlists& slice : slices) {
        slice.settle(slot, exact);
        slice.append_nearest(slot, found);
    }
    for (const Ranked& row : found) {
        nearest.offer(row);
    }
    return true;
}

// Writes the answers; returns the queries that have none.
std::vector<std::int64_t> rank(const KnnParams& params,
                               Sweep<Shortlists>& sweep,
                               const Kernels& kernels,
                               Execution& execution,
                               SearchCounters& counters) {
    constexpr std::int64_t kQueriesPerTask = 16;
    const std::vector<std::int64_t>& ids = sweep.ids();
    const auto num_queries = static_cast<std::int64_t>(ids.size());
    std::vector<char> failed(ids.size(), 0);
    std::atomic<std::int64_t> taken{0};
    execution.parallel_for(
        (num_queries + kQueriesPerTask - 1) / kQueriesPerTask, [&](std::int64_t task, int) {
            ExactDistances exact(params, kernels);
            const std::int64_t end = std::min(num_queries, (task + 1) * kQueriesPerTask);
            for (std::int64_t slot = task * kQueriesPerTask; slot < end; ++slot) {
                const auto s = static_cast<std::size_t>(slot);
                Nearest nearest(params.k);
                if (join(sweep.slices(), slot, params.k, exact, nearest)) {
                    write(params, ids[s], exact, nearest.sorted());
                } else {
                    failed[s] = 1;
                }
                for (const Shortlists& slice : sweep.slices()) {
                    taken += slice.num_taken(slot);
                }
            }
        });
    counters.reranked += taken;
    std::vector<std::int64_t> without;
    for (std::size_t s = 0; s < ids.size(); ++s) {
        if (failed[s] != 0) {
            without.push_back(ids[s]);
        }
    }
    return without;
}

// Every row against the given queries in float64. A task is a block of the memory that stays in the
// cache while the queries pass over it.
void search_exhaustively(const KnnParams& params,
                         const std::vector<std::int64_t>& ids,
                         const Kernels& kernels,
                         Execution& execution) {
    constexpr std::int64_t kBlockBytes = 256 << 10, kNearestBytes = 64 << 20, kMostQueries = 64;
    const Rows& memory = params.memory;
    const std::int64_t row_bytes = std::max<std::int64_t>(memory.dim * bytes_of(memory.dtype), 1);
    const std::int64_t block = std::clamp<std::int64_t>(kBlockBytes / row_bytes, 16, 4096);
    const auto num_threads = static_cast<std::size_t>(execution.num_threads());
    const auto nearest_bytes = static_cast<std::int64_t>(2 * sizeof(Ranked) * num_threads);
    const std::int64_t step =
        std::clamp<std::int64_t>(kNearestBytes / (nearest_bytes * params.k), 1, kMostQueries);
    const auto num_queries = static_cast<std::int64_t>(ids.size());
    std::atomic<bool> all_finite{true};
    for (std::int64_t first = 0; first < num_queries; first += step) {
        const auto count = static_cast<std::size_t>(std::min(step, num_queries - first));
        const std::int64_t* queries = ids.data() + first;
        // The nearest k of all are among the nearest k of each thread, whichever rows it gets.
        std::vector<std::vector<Nearest>> nearest(num_threads,
                                                  std::vector<Nearest>(count, Nearest(params.k)));
        execution.parallel_for(
            (memory.num_rows + block - 1) / block, [&](std::int64_t task, int worker) {
                ExactDistances exact(params, kernels);
                const std::int64_t end = std::min(memory.num_rows, (task + 1) * block);
                for (std::size_t q = 0; q < count; ++q) {
                    Nearest& found = nearest[static_cast<std::size_t>(worker)][q];
                    exact.begin(queries[q]);
                    for (std::int64_t row = task * block; row < end; ++row) {
                        if (params.mask.allows(queries[q], row)) {
                            const Ranked ranked{exact.key(row), row};
                            found.offer(ranked);
                            if (!ranked.is_usable()) {
                                all_finite = false;
                            }
                        }
                    }
                }
            });
        if (!all_finite) {
            check_memory(params, kernels, execution);
        }
        const ExactDistances exact(params, kernels);
        for (std::size_t q = 0; q < count; ++q) {
            Nearest all(params.k);
            for (std::vector<Nearest>& of_thread : nearest) {
                for (const Ranked& row : of_thread[q].sorted()) {
                    all.offer(row);
                }
            }
            write(params, queries[q], exact, all.sorted());
        }
    }
}

}  // namespace

SearchCounters knn_cpu(const KnnParams& params,
                       const PackedMemory* packed,
                       Isa isa,
                       Precision precision,
                       Execution& execution) {
    check_search(params, packed);
    PYFEAT_CHECK(params.k >= 1 && params.k <= params.memory.num_rows, "k must be in [1, N]");
    SearchCounters counters;
    if (params.queries.num_rows == 0) {
        return counters;
    }
    MemorySearch search(params, packed, isa, precision, execution);
    const Kernels& kernels = search.kernels();
    const bool tiles = worth_tiles(params, packed, kernels);
    // Distances from rows that are looked at tell in passing whether these are finite; rows of
    // float64 can also be too long.
    const bool looks_at_all = params.mask.data == nullptr && params.memory.dtype != Dtype::kFloat64;
    if (!tiles && !looks_at_all) {
        check_memory(params, kernels, execution);
    }
    const ExactDistances exact(params, kernels);
    for (std::int64_t query = 0; params.nonfinite == NonFinite::kSkip; ++query) {
        if (query == params.queries.num_rows) {
            break;
        }
        write(params, query, exact, {});  // what is left of queries that are skipped
    }
    // A query that takes more distances than this is better off with finer tiles.
    const std::int64_t patience = std::max(params.memory.num_rows / 32, 256 + 8 * params.k);
    const auto attempt =
        [&](Precision with, const Frame& frame, std::vector<std::int64_t> pending) {
            const ScoreLimits limits(frame, params.memory.dim);
            const auto make_shortlists = [&](const std::vector<std::int64_t>& ids,
                                             const PackedQueries& queries,
                                             std::int64_t num_slices) {
                return Shortlists(
                    params, kernels, limits, ids, queries, params.k, patience / num_slices);
            };
            Sweep<Shortlists> sweep(params,
                                    Engine{&kernels, with, params.bound_scale},
                                    execution,
                                    frame,
                                    std::move(pending),
                                    make_shortlists);
            search.for_each_chunk(with, [&](const PackedRows& chunk) { sweep.search(chunk); });
            return rank(params, sweep, kernels, execution, counters);
        };
    search.run(Shortlists::bytes_per_query(params.k),
               tiles,
               counters,
               attempt,
               [&](const std::vector<std::int64_t>& ids) {
                   search_exhaustively(params, ids, kernels, execution);
               });
    return counters;
}

}  // namespace pyfeat
