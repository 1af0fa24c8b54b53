// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: gradients of losses over all pairs, from tiles that are
// recomputed and dropped.
#pragma once

#include "cpu/isa.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Three products of matrices: S again unless it was kept, dS B and dS^T A, in float32; two of a
// batch with itself. bfloat16 features are multiplied in pairs where there is an instruction for
// it, with float32 sums: their S is as exact, and dS is rounded to bfloat16. The same bits from any
// number of threads. Workspace: 12 bytes for every feature of A and B (bfloat16 in pairs: 8), and
// 350 KB for each thread.
//
// Throws std::invalid_argument for features that are not finite and for products that could pass
// 1e36.
void contrast_gradient_cpu(const ContrastGradientParams& params, Isa isa, Execution& execution);

}  // namespace pyfeat
