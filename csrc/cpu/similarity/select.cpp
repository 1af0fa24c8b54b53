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
#include "cpu/similarity/exact.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/shortlist.hpp"

namespace pyfeat {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A search packs this much of the memory at a time: about what the last-level cache holds, and
// enough for the threads to be busy between two barriers. A memory packed for keeps has larger
// chunks. With the packed queries and their shortlists the workspace stays well under 256 MB.
constexpr std::int64_t kChunkBytes = 16LL << 20;
constexpr std::int64_t kKeptChunkBytes = 1LL << 30;
constexpr std::int64_t kQueryBudgetBytes = 96LL << 20;
constexpr std::int64_t kLargestShortlistK = 1024;
constexpr std::int64_t kLargestTileDim = 1LL << 20;  // D u < 1/2 with room, as the bound assumes
constexpr std::int64_t kQueryPanelsPerTask = 20;

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
            std::clamp<std::int64_t>(queries_.num_panels / (4 * wanted), 1, kQueryPanelsPerTask);
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

// Rows of the memory that one packed chunk may hold.
std::int64_t rows_per_chunk(const Rows& memory, const Kernels& kernels, std::int64_t bytes) {
    const std::int64_t row_bytes = std::max<std::int64_t>(4 * kernels.words(memory.dim), 1);
    return even_chunk(memory.num_rows, bytes / row_bytes, kernels.tile_rows);
}

// With this many neighbours the float64 distances cost more than the tiles would save.
bool worth_tiles(const Rows& memory, std::int64_t k) {
    return k <= kLargestShortlistK && 4 * k <= memory.num_rows && memory.dim <= kLargestTileDim;
}

}  // namespace

PackedMemory::PackedMemory(const Rows& memory, Metric metric, Isa isa, Execution& execution)
    : isa(isa), num_rows(memory.num_rows), dim(memory.dim) {
    PYFEAT_CHECK(memory.num_rows > 0, "memory must have at least one row");
    const Kernels& kernels = kernels_for(isa);
    check_finite(memory, "knn: memory", kernels, execution);
    frame = choose_frame(memory, metric, kernels, execution);
    const std::int64_t chunk = rows_per_chunk(memory, kernels, kKeptChunkBytes);
    for (std::int64_t row = 0; row < num_rows; row += chunk) {
        const std::int64_t count = std::min(chunk, num_rows - row);
        pack_memory(memory, row, count, frame, kernels, execution, chunks.emplace_back());
    }
}

KnnCounters knn_cpu(const KnnParams& params,
                    const PackedMemory* packed,
                    Isa isa,
                    Execution& execution) {
    const Rows& queries = params.queries;
    const Rows& memory = params.memory;
    PYFEAT_CHECK(queries.dim == memory.dim, "queries and memory must have the same width");
    PYFEAT_CHECK(params.k >= 1 && params.k <= memory.num_rows, "k must be in [1, N]");
    if (packed != nullptr) {
        PYFEAT_CHECK(packed->num_rows == memory.num_rows && packed->dim == memory.dim &&
                         packed->frame.metric == params.metric,
                     "packed must hold the memory that is searched, for the same metric");
        isa = packed->isa;
    }
    KnnCounters counters;
    if (queries.num_rows == 0) {
        return counters;
    }

    const Kernels& kernels = kernels_for(isa);
    check_finite(queries, "knn: queries", kernels, execution);
    if (packed == nullptr) {
        check_finite(memory, "knn: memory", kernels, execution);
    }

    if (!worth_tiles(memory, params.k)) {
        std::vector<std::int64_t> all(static_cast<std::size_t>(queries.num_rows));
        std::iota(all.begin(), all.end(), 0);
        search_exhaustively(params, kernels, execution, all);
        return counters;
    }

    const Frame frame =
        packed != nullptr ? packed->frame : choose_frame(memory, params.metric, kernels, execution);
    const std::int64_t query_bytes =
        4 * kernels.words(memory.dim) + Shortlists::bytes_per_query(params.k);
    const std::int64_t query_chunk =
        even_chunk(queries.num_rows, kQueryBudgetBytes / query_bytes, kernels.tile_queries);
    const std::int64_t chunk_rows = rows_per_chunk(memory, kernels, kChunkBytes);
    PackedRows chunk;

    for (std::int64_t first = 0; first < queries.num_rows; first += query_chunk) {
        const std::int64_t count = std::min(query_chunk, queries.num_rows - first);
        TileSearch search(params, kernels, execution, frame, first, count);
        if (packed != nullptr) {
            for (const PackedRows& kept : packed->chunks) {
                search.search(kept);
            }
        } else {
            for (std::int64_t row = 0; row < memory.num_rows; row += chunk_rows) {
                const std::int64_t rows = std::min(chunk_rows, memory.num_rows - row);
                pack_memory(memory, row, rows, frame, kernels, execution, chunk);
                search.search(chunk);
            }
        }
        const std::vector<std::int64_t> overflowed = search.finish(counters);
        search_exhaustively(params, kernels, execution, overflowed);
        counters.exhaustive += static_cast<std::int64_t>(overflowed.size());
    }
    return counters;
}

}  // namespace pyfeat
