// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: log-sum-exp over the rows and over the columns of
// S = scale * A B^T, in one pass.
#pragma once

#include "cpu/isa.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// With products in tiles, |a| and |b| the largest norms, u = 2^-24 and n = min(D, 64) + D / 64 + 5,
//   |error| <= n u |scale| |a| |b| + 80 u,
// the first part from the products, the second from the powers and their sums; of bfloat16 features
// n = min(D, 128) + D / 128 + 6 where they are multiplied in pairs. With float64 products u =
// 2^-53, n = D + 4, and L + S takes the place of 80. The same bits from any number of threads; rows
// that are equal have equal sums. Workspace: 16 bytes for every row of A and B, and at most 256 MB
// (150 MB below 10,000 features).
//
// Throws std::invalid_argument for features that are not finite and for products that could pass
// 1e36 (float64: 1e300).
void log_sum_exp_cpu(const LogSumExpParams& params, Isa isa, Execution& execution);

}  // namespace pyfeat
