// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: the k nearest rows of every query.
#pragma once

#include "cpu/isa.hpp"
#include "cpu/similarity/search.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Exact: equal to float64 brute force by direct differences, ties to the lower index. Throws
// std::invalid_argument for features that are not finite, and Interrupted. `packed` is the same
// memory packed beforehand, with the instruction set and precision to use, or null.
// Workspace: at most 256 MB whatever Q and N, plus 32 k bytes per thread.
SearchCounters knn_cpu(const KnnParams& params,
                       const PackedMemory* packed,
                       Isa isa,
                       Precision precision,
                       Execution& execution);

}  // namespace pyfeat
