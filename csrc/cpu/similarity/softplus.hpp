// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: sums of softplus over all pairs and their gradients.
#pragma once

#include "cpu/isa.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Sums and gradients in one pass: no gradient needs a sum over other pairs. One product of matrices
// in float32 for the sums and one for each gradient. The same bits from any number of threads.
// Workspace as for contrast_gradient_cpu.
//
// Throws std::invalid_argument for features that are not finite and for products that could pass
// 1e36.
void softplus_cpu(const SoftplusParams& params, Isa isa, Execution& execution);

}  // namespace pyfeat
