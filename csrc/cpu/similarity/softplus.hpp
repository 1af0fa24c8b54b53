// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: sums of softplus over all pairs and their gradients.
#pragma once

#include "cpu/isa.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Sums and gradients in one pass: no gradient needs a sum over other pairs. One product of matrices
// for the sums and one for each gradient, as exact as those of contrast_gradient_cpu. The same bits
// from any number of threads. Workspace as there.
//
// Throws std::invalid_argument for features that are not finite and for products that could pass
// 1e36.
void softplus_cpu(const SoftplusParams& params, Isa isa, Execution& execution);

}  // namespace pyfeat
