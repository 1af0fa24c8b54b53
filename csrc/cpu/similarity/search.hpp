// SPDX-License-Identifier: Apache-2.0
// What all searches share: a memory packed beforehand or chunk by chunk, and the precisions that
// are tried one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// A memory in the order that tiles read it, to be searched again and again. The rows themselves
// stay with the caller: the final distances are taken from them.
struct PackedMemory {
    Isa isa;
    Precision precision;
    std::int64_t num_rows, dim;
    NonFinite nonfinite;
    Frame frame;
    std::vector<PackedRows> chunks;

    // Throws std::invalid_argument for features that are not finite, unless they are skipped.
    PackedMemory(const Rows& memory,
                 Metric metric,
                 NonFinite nonfinite,
                 Isa isa,
                 Precision precision,
                 double bound_scale,
                 Execution& execution);
};

// Throws std::invalid_argument for arguments that would read or write out of bounds.
void check_search(const SearchParams& params, const PackedMemory* packed);

// Throws for the first row of the memory that is not usable, if such are refused.
void check_memory(const SearchParams& params, const Kernels& kernels, Execution& execution);

// One search over a memory, packed or not.
class MemorySearch {
  public:
    MemorySearch(const SearchParams& params,
                 const PackedMemory* packed,
                 Isa isa,
                 Precision precision,
                 Execution& execution);

    const Kernels& kernels() const {
        return *kernels_;
    }

    // Calls use(chunk) with the whole memory in chunks packed for `precision`.
    template <typename Use>
    void for_each_chunk(Precision precision, Use use) {
        if (packed_ != nullptr && precision == precision_) {
            for (const PackedRows& chunk : packed_->chunks) {
                use(chunk);
            }
            return;
        }
        const Engine engine{kernels_, precision, params_.bound_scale};
        const std::int64_t chunk_rows = rows_per_chunk(engine);
        for (std::int64_t row = 0; row < params_.memory.num_rows; row += chunk_rows) {
            pack_chunk(engine, row, chunk_rows);
            use(chunk_);
        }
    }

    // Calls attempt(precision, frame, ids) for ranges of queries that fit the workspace, given what
    // one of them takes in bytes beside its packed features; it returns the ids that it has not
    // answered, and those are tried again in the next finer precision, or by
    // exhaustive(ids), which must answer them.
    template <typename Attempt, typename Exhaustive>
    void run(std::int64_t bytes_per_query,
             bool worth_tiles,
             SearchCounters& counters,
             Attempt attempt,
             Exhaustive exhaustive) {
        const std::int64_t num_queries = params_.queries.num_rows;
        const std::int64_t largest = queries_per_range(bytes_per_query);
        for (std::int64_t first = 0; first < num_queries; first += largest) {
            std::vector<std::int64_t> ids =
                usable_queries(first, std::min(num_queries, first + largest));
            if (worth_tiles && !ids.empty()) {
                ids = attempt(precision_, frame(), std::move(ids));
                counters.retried += static_cast<std::int64_t>(ids.size());
                // Packing the memory again pays off only for several queries.
                constexpr std::size_t kFewQueries = 4;
                if (precision_ != Precision::kFloat32 && ids.size() > kFewQueries) {
                    ids = attempt(Precision::kFloat32, frame(), std::move(ids));
                }
            }
            counters.exhaustive += static_cast<std::int64_t>(ids.size());
            exhaustive(ids);
        }
    }

  private:
    const Frame& frame() const {
        return packed_ != nullptr ? packed_->frame : own_frame_;
    }
    void pack_chunk(const Engine& engine, std::int64_t first_row, std::int64_t chunk_rows);
    std::int64_t rows_per_chunk(const Engine& engine) const;
    std::int64_t queries_per_range(std::int64_t bytes_per_query) const;
    std::vector<std::int64_t> usable_queries(std::int64_t first, std::int64_t end) const;

    const SearchParams& params_;
    const PackedMemory* packed_;
    const Kernels* kernels_;
    Precision precision_;
    Execution& execution_;
    Frame own_frame_;
    PackedRows chunk_;
};

// Whether tiles of any precision can hold the rows.
bool fits_tiles(const Rows& memory, const Kernels& kernels);

}  // namespace pyfeat
