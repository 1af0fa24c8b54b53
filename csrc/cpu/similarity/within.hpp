// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: all rows within a radius of every query.
#pragma once

#include "cpu/isa.hpp"
#include "cpu/similarity/search.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Exact: the rows that float64 brute force by direct differences finds. Errors as knn_cpu.
// Workspace: at most 256 MB beside the result and one index for each row of it.
RangeResult within_cpu(const RangeParams& params,
                       const PackedMemory* packed,
                       Isa isa,
                       Precision precision,
                       Execution& execution,
                       SearchCounters& counters);

}  // namespace pyfeat
