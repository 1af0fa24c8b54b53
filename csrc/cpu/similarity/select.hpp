// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: the k nearest rows of every query.
#pragma once

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
    std::int64_t num_rows, dim;
    Frame frame;
    std::vector<PackedRows> chunks;

    // Throws std::invalid_argument for features that are not finite.
    PackedMemory(const Rows& memory, Metric metric, Isa isa, Execution& execution);
};

// Exact: equal to float64 brute force by direct differences, ties to the lower index. Throws
// std::invalid_argument for features that are not finite, and Interrupted. `packed` is the same
// memory packed beforehand, with the instruction set to use, or null.
// Workspace: at most 256 MB whatever Q and N, plus 32 k bytes per thread.
KnnCounters knn_cpu(const KnnParams& params,
                    const PackedMemory* packed,
                    Isa isa,
                    Execution& execution);

}  // namespace pyfeat
