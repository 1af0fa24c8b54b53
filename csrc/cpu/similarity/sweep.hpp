// SPDX-License-Identifier: Apache-2.0
// Some of the queries against a memory, tile by tile. What is done with a tile before it is dropped
// is up to the Collector:
//   const float* thresholds() const         [slots] upper bounds of the scores it still wants
//   void offer(slot, {lower, upper}, row)   a row whose score lies between these
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

template <typename Collector>
class Sweep {
  public:
    // make_collector(ids, queries, num_slices) is called once for each slice of the memory.
    template <typename MakeCollector>
    Sweep(const SearchParams& params,
          const Engine& engine,
          Execution& execution,
          const Frame& frame,
          std::vector<std::int64_t> ids,
          MakeCollector make_collector)
        : mask_(params.mask),
          tiles_(engine.tiles()),
          execution_(execution),
          words_(tiles_.words(params.memory.dim)),
          ids_(std::move(ids)),
          queries_(pack_queries(params.queries, ids_, frame, engine, execution)) {
        // Tasks are groups of queries: a few for each thread if they are large enough then for
        // their products with a block of memory to outweigh its way into the cache. Where there are
        // too few queries to feed the threads, groups are cut into slices of the memory, with a
        // collector each.
        constexpr std::int64_t kQueries = 256, kLeastQueries = 64, kTasksPerThread = 4;
        const std::int64_t threads = execution.num_threads(), panels = queries_.num_panels;
        const auto groups_of = [&](std::int64_t queries, std::int64_t most) {
            return std::clamp<std::int64_t>(panels * tiles_.queries / queries, 1, most);
        };
        std::int64_t groups = groups_of(kQueries, kTasksPerThread * threads) / threads * threads;
        if (groups == 0) {
            groups = groups_of(kLeastQueries, threads);
        }
        panels_per_task_ = std::max<std::int64_t>((panels + groups - 1) / groups, 1);
        num_groups_ = (panels + panels_per_task_ - 1) / panels_per_task_;
        const std::int64_t num_slices =
            groups < threads ? (kTasksPerThread * threads + groups - 1) / groups : 1;
        for (std::int64_t s = 0; s < num_slices; ++s) {
            slices_.push_back(make_collector(ids_, queries_, num_slices));
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

    const std::vector<std::int64_t>& ids() const {
        return ids_;
    }
    bool beyond(std::int64_t slot) const {
        return queries_.beyond[static_cast<std::size_t>(slot)] != 0;
    }
    std::vector<Collector>& slices() {
        return slices_;
    }
    Sweep(const Sweep&) = delete;
    Sweep& operator=(const Sweep&) = delete;

  private:
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
                      Collector& collector) {
        const std::int64_t block = panels_per_block(memory);
        for (std::int64_t begin = first_panel; begin < end_panel; begin += block) {
            const std::int64_t end = std::min(end_panel, begin + block);
            for (std::int64_t qp = first_query_panel; qp < end_query_panel; ++qp) {
                if (execution_.stop_requested()) {
                    return;
                }
                const TileUse use(tiles_);
                for (std::int64_t mp = begin; mp < end; ++mp) {
                    search_tile(memory, qp, mp, collector);
                }
            }
        }
    }

    void search_tile(const PackedRows& memory,
                     std::int64_t query_panel,
                     std::int64_t memory_panel,
                     Collector& collector) {
        alignas(64) float scores[kMaxTileQueries * kMaxTileRows];
        std::uint32_t marks[kMaxTileQueries];
        const std::int64_t first_slot = query_panel * tiles_.queries;
        const std::int64_t first_lane = memory_panel * tiles_.rows;
        const Tile tile{words_,
                        queries_.panel(query_panel),
                        memory.panel(memory_panel),
                        memory.row_terms.data() + first_lane,
                        memory.row_units.data() + first_lane,
                        queries_.units.data() + first_slot,
                        queries_.norms.data() + first_slot,
                        queries_.residuals.data() + first_slot,
                        collector.thresholds() + first_slot,
                        memory.panel_bounds[static_cast<std::size_t>(memory_panel)]};
        if (!tiles_.score(tile, scores, marks)) {
            return;
        }
        for (int r = 0; r < tiles_.queries; ++r) {
            for (std::uint32_t mark = marks[r]; mark != 0; mark &= mark - 1) {
                const int c = lowest_bit(mark);
                offer(
                    memory, first_slot + r, first_lane + c, scores[r * tiles_.rows + c], collector);
            }
        }
    }

    static int lowest_bit(std::uint32_t mark) {
#if defined(__GNUC__)
        return __builtin_ctz(mark);
#else
        int bit = 0;
        for (; (mark & 1U) == 0; mark >>= 1) {
            ++bit;
        }
        return bit;
#endif
    }

    void offer(const PackedRows& memory,
               std::int64_t slot,
               std::int64_t lane,
               double score,
               Collector& collector) {
        const std::int64_t row = memory.first_row + lane;
        const auto s = static_cast<std::size_t>(slot);
        if (!mask_.allows(ids_[s], row)) {
            return;
        }
        const ErrorBounds& bounds = memory.row_bounds[static_cast<std::size_t>(lane)];
        const double error = static_cast<double>(queries_.norms[s]) * bounds.reach +
                             static_cast<double>(queries_.residuals[s]) * bounds.norm +
                             bounds.slack;
        collector.offer(slot, {round_down(score - error), round_up(score + error)}, row);
    }

    Mask mask_;
    const TileKernels& tiles_;
    Execution& execution_;
    std::int64_t words_;
    std::vector<std::int64_t> ids_;  // [slots] which queries
    PackedQueries queries_;
    std::int64_t panels_per_task_ = 1, num_groups_ = 1;
    std::vector<Collector> slices_;
};

}  // namespace pyfeat
