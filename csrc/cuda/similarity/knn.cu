// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>

#include "check.hpp"
#include "cuda/similarity/knn.hpp"
#include "cuda/similarity/pack.cuh"
#include "cuda/similarity/products.cuh"
#include "cuda/similarity/rank.cuh"
#include "cuda/similarity/shortlist.cuh"

namespace pyfeat::cuda {
namespace {

std::string shape(const Rows& rows) {
    return "[" + std::to_string(rows.num_rows) + ", " + std::to_string(rows.dim) + "]";
}

dim3 blocks(std::int64_t count) {
    return dim3(static_cast<unsigned>(count));
}

// Sampled tiles have at least two groups of eight rows for each neighbour.
std::int64_t sample_step(const PackedMemory& memory, std::int64_t k, std::int64_t columns) {
    const std::int64_t tiles = memory.map.num_slots() / columns;
    const std::int64_t fewest = ceil_div(2 * k, columns / 8);
    return std::clamp<std::int64_t>(tiles / fewest, 1, shortlist_sizes(k).sampling);
}

// One search of one part of the memory.
class Search {
  public:
    Search(const KnnCall& call, const Site& site)
        : call_(call),
          site_(site),
          memory_(packed_part(call)),
          state_(query_state(call)),
          spare_(static_cast<float>(kSpare * call.bound_scale)) {}

    template <typename Feature>
    void run() const {
        const RankedRows<Feature> rows{feature_rows<Feature>(call_.queries),
                                       feature_rows<Feature>(call_.memory),
                                       call_.metric,
                                       call_.mask};
        if (call_.begins) {
            launch(site_,
                   {blocks(ceil_div(state_.num_queries, kPanelRows) * (kPanelRows / kPackWarps)),
                    dim3(kPackThreads)},
                   pack_queries_kernel<Feature>,
                   rows.queries,
                   call_.frame,
                   call_.metric,
                   state_);
        }
        list_rows();
        launch(site_,
               {blocks(state_.num_queries),
                dim3(kRankThreads),
                static_cast<std::size_t>(ListedScratch::bytes(state_.capacity, state_.k))},
               rank_listed_kernel<Feature>,
               rows,
               state_,
               memory_,
               spare_);
        const std::int64_t most =
            std::max<std::int64_t>(1, state_.num_queries) * (memory_.map.num_slots() / kRankedRows);
        launch(site_,
               {blocks(std::min<std::int64_t>(most, 8 * num_multiprocessors(site_))),
                dim3(kRankThreads),
                RankedScratch::kBytes},
               rank_all_kernel<Feature>,
               rows,
               state_,
               memory_);
        if (call_.ends) {
            launch(site_,
                   {blocks(ceil_div(state_.num_queries * state_.k, kOutputThreads)),
                    dim3(kOutputThreads)},
                   write_neighbours_kernel,
                   state_,
                   call_.metric,
                   call_.outputs);
        }
    }

  private:
    static PackedMemory packed_part(const KnnCall& call) {
        Carver carver(call.packed);
        return carve_memory(map_rows(call.first, call.end), call.memory.dim, carver);
    }
    static SearchState query_state(const KnnCall& call) {
        Carver carver(call.workspace);
        return carve_state(call.queries.num_rows, call.queries.dim, call.k, carver);
    }

    // Thresholds from a sample of the tiles, then the lists from all.
    void list_rows() const {
        const std::int64_t columns = tile_columns(site_);
        const std::int64_t step = sample_step(memory_, call_.k, columns);
        const ShortlistParams params{state_,
                                     memory_,
                                     call_.mask,
                                     spare_,
                                     static_cast<std::int32_t>(columns),
                                     static_cast<std::int32_t>(step)};
        const Panels queries = state_.panels(), rows = memory_.panels();
        launch_tile_products<SampleUppers>(
            site_, queries, rows, plan_products(site_, queries, rows, step), params);
        launch(site_,
               {blocks(ceil_div(state_.num_queries, kRankWarps)),
                dim3(kRankThreads),
                sizeof(std::int32_t) * kRankWarps * static_cast<std::size_t>(state_.lanes)},
               threshold_kernel,
               state_);
        launch_tile_products<ListWithin>(
            site_, queries, rows, plan_products(site_, queries, rows), params);
    }

    const KnnCall& call_;
    const Site& site_;
    PackedMemory memory_;
    SearchState state_;
    float spare_;
};

}  // namespace

std::int64_t packed_bytes(std::int64_t num_rows, std::int64_t dim) {
    Carver carver;
    carve_memory(map_rows(0, num_rows), dim, carver);
    return carver.bytes();
}

std::int64_t workspace_bytes(std::int64_t num_queries, std::int64_t dim, std::int64_t k) {
    Carver carver;
    carve_state(num_queries, dim, k, carver);
    return carver.bytes();
}

std::pair<std::int64_t, std::int64_t> count_offsets(std::int64_t num_queries,
                                                    std::int64_t dim,
                                                    std::int64_t k) {
    alignas(256) static char memory;
    Carver carver(&memory);
    const SearchState state = carve_state(num_queries, dim, k, carver);
    const auto offset = [](const void* array) { return static_cast<const char*>(array) - &memory; };
    return {offset(state.counts), offset(state.num_overflowed)};
}

void pack_memory(const PackCall& call, const Queue& queue) {
    const Site site{"knn", "memory " + shape(call.memory), queue};
    PYFEAT_CHECK(0 <= call.first && call.first < call.end && call.end <= call.memory.num_rows &&
                     call.end - call.first <= kMostPackedRows,
                 "knn: rows must lie in ",
                 site.shapes,
                 ", got ",
                 call.first,
                 " to ",
                 call.end);
    const DeviceGuard guard(site);
    Carver carver(call.packed);
    const PackedMemory packed =
        carve_memory(map_rows(call.first, call.end), call.memory.dim, carver);
    with_feature_type(call.memory.dtype, [&](auto feature) {
        launch(site,
               {blocks(packed.map.num_slots() / kPanelRows),
                dim3(kPackThreads),
                sizeof(RowTerms) * kPackWarps},
               pack_memory_kernel<decltype(feature)>,
               feature_rows<decltype(feature)>(call.memory),
               call.allowed,
               call.frame,
               call.metric,
               packed);
    });
}

void knn(const KnnCall& call, const Queue& queue) {
    const Site site{
        "knn", "queries " + shape(call.queries) + ", memory " + shape(call.memory), queue};
    PYFEAT_CHECK(1 <= call.k && call.k <= kMostNeighbours && call.queries.num_rows >= 1 &&
                     call.queries.dim == call.memory.dim &&
                     call.queries.dtype == call.memory.dtype && 0 <= call.first &&
                     call.first < call.end && call.end <= call.memory.num_rows,
                 "knn: arguments must fit each other, got k ",
                 call.k,
                 ", rows ",
                 call.first,
                 " to ",
                 call.end,
                 ", ",
                 site.shapes);
    const DeviceGuard guard(site);
    const Search search(call, site);
    with_feature_type(call.queries.dtype,
                      [&](auto feature) { search.template run<decltype(feature)>(); });
}

}  // namespace pyfeat::cuda
