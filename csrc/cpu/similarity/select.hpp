// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: the k nearest rows of every query.
#pragma once

#include "cpu/isa.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Exact: equal to float64 brute force by direct differences, ties to the lower index. Throws
// std::invalid_argument for features that are not finite, and Interrupted.
// Workspace: at most 256 MB whatever Q and N, plus 32 k bytes per thread.
KnnCounters knn_cpu(const KnnParams& params, Isa isa, Execution& execution);

}  // namespace pyfeat
