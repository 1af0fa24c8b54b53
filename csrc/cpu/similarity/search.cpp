// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/search.hpp"

#include <algorithm>

#include "check.hpp"

namespace pyfeat {
namespace {

// A search packs this much of the memory at a time: about what the last-level cache holds, and
// enough for the threads to be busy between two barriers. A memory packed for keeps has larger
// chunks. With the packed queries and their shortlists the workspace stays well under 256 MB.
constexpr std::int64_t kChunkBytes = 16LL << 20;
constexpr std::int64_t kKeptChunkBytes = 1LL << 30;
constexpr std::int64_t kQueryBudgetBytes = 96LL << 20;

std::int64_t chunk_of(const Rows& memory, const TileKernels& tiles, std::int64_t bytes) {
    const std::int64_t row_bytes =
        4 * tiles.row_words(memory.dim) + 8 + static_cast<std::int64_t>(sizeof(ErrorBounds));
    return even_chunk(memory.num_rows, bytes / row_bytes, tiles.rows);
}

}  // namespace

PackedMemory::PackedMemory(const Rows& memory,
                           Metric metric,
                           NonFinite nonfinite,
                           Isa isa,
                           Precision precision,
                           double bound_scale,
                           Execution& execution)
    : isa(isa),
      precision(precision),
      num_rows(memory.num_rows),
      dim(memory.dim),
      nonfinite(nonfinite) {
    PYFEAT_CHECK(memory.num_rows > 0, "memory must have at least one row");
    const Engine engine{&kernels_for(isa), precision, bound_scale};
    frame = choose_frame(memory, metric, *engine.kernels);
    const std::int64_t chunk = chunk_of(memory, engine.tiles(), kKeptChunkBytes);
    for (std::int64_t row = 0; row < num_rows; row += chunk) {
        const std::int64_t count = std::min(chunk, num_rows - row);
        const std::int64_t unusable =
            pack_memory(memory, row, count, frame, engine, execution, chunks.emplace_back());
        if (unusable >= 0 && nonfinite == NonFinite::kRefuse) {
            refuse_row("knn", "memory", memory.dtype, unusable);
        }
    }
}

void check_search(const SearchParams& params, const PackedMemory* packed) {
    const Rows& queries = params.queries;
    const Rows& memory = params.memory;
    PYFEAT_CHECK(queries.dim == memory.dim, "queries and memory must have the same width");
    PYFEAT_CHECK(
        packed == nullptr || (packed->num_rows == memory.num_rows && packed->dim == memory.dim &&
                              packed->frame.metric == params.metric),
        "packed must hold the memory that is searched, for the same metric");
}

void check_memory(const SearchParams& params, const Kernels& kernels, Execution& execution) {
    if (params.nonfinite == NonFinite::kRefuse) {
        check_finite(params.memory, params.op, "memory", kernels, execution);
    }
}

MemorySearch::MemorySearch(const SearchParams& params,
                           const PackedMemory* packed,
                           Isa isa,
                           Precision precision,
                           Execution& execution)
    : params_(params),
      packed_(packed),
      kernels_(&kernels_for(packed != nullptr ? packed->isa : isa)),
      precision_(packed != nullptr ? packed->precision : precision),
      execution_(execution) {
    if (params.nonfinite == NonFinite::kRefuse) {
        check_finite(params.queries, params.op, "queries", *kernels_, execution);
    }
    if (packed == nullptr) {
        own_frame_ = choose_frame(params.memory, params.metric, *kernels_);
    }
}

void MemorySearch::pack_chunk(const Engine& engine,
                              std::int64_t first_row,
                              std::int64_t chunk_rows) {
    const std::int64_t count = std::min(chunk_rows, params_.memory.num_rows - first_row);
    const std::int64_t unusable =
        pack_memory(params_.memory, first_row, count, frame(), engine, execution_, chunk_);
    if (unusable >= 0 && params_.nonfinite == NonFinite::kRefuse) {
        refuse_row(params_.op, "memory", params_.memory.dtype, unusable);
    }
}

std::int64_t MemorySearch::rows_per_chunk(const Engine& engine) const {
    return chunk_of(params_.memory, engine.tiles(), kChunkBytes);
}

std::int64_t MemorySearch::queries_per_range(std::int64_t bytes_per_query) const {
    const TileKernels& tiles = kernels_->tile_kernels(precision_);
    const std::int64_t bytes = 4 * tiles.words(params_.memory.dim) + bytes_per_query + 32;
    return even_chunk(params_.queries.num_rows, kQueryBudgetBytes / bytes, tiles.queries);
}

std::vector<std::int64_t> MemorySearch::usable_queries(std::int64_t first, std::int64_t end) const {
    const Rows& queries = params_.queries;
    const RowKernels& row_kernels = kernels_->row_kernels(queries.dtype);
    std::vector<std::int64_t> ids;
    ids.reserve(static_cast<std::size_t>(end - first));
    for (std::int64_t query = first; query < end; ++query) {
        if (params_.nonfinite == NonFinite::kRefuse ||
            is_usable(row_kernels.squared_norm(queries.row(query), queries.dim))) {
            ids.push_back(query);
        }
    }
    return ids;
}

bool fits_tiles(const Rows& memory, const Kernels& kernels) {
    return memory.dim <= kernels.tile_kernels(Precision::kFloat32).largest_dim;
}

}  // namespace pyfeat
