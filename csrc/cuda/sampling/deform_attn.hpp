// SPDX-License-Identifier: Apache-2.0
// Deformable attention on a GPU. Results are of the dtype of sums, but for the output, which is of
// that of values.
#pragma once

#include <cstdint>

#include "cuda/launch.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

// Into output [B, Q, H, D].
void gather(const DeformAttnParams& params, void* output, const Site& site);

// Upstream is of the dtype of values; the gradient by values is added to, in no fixed order.
void gather_gradients(const DeformAttnParams& params,
                      const DeformAttnGradients& gradients,
                      const Site& site);

// Some queries of all batches, [first, last) of B Q, of which every corner of a point is a term in
// the gradient by values. A slot is a cell of a head of a batch, from those of the first batch.
struct TermsPart {
    std::int64_t first, last;
};

// Adds the number of terms of every slot to counts [slots].
void count_terms(const DeformAttnParams& params,
                 const TermsPart& part,
                 std::int32_t* counts,
                 const Site& site);

// Adds the terms of every slot to the gradient by values, in the order of queries and points. ends
// [slots + 1] holds the numbers of terms up to every slot and in all, and is overwritten; terms has
// 8 bytes for each, 16 if values are double.
void gather_terms(const DeformAttnParams& params,
                  const TermsPart& part,
                  std::int32_t* ends,
                  void* terms,
                  const DeformAttnGradients& gradients,
                  const Site& site);

}  // namespace pyfeat::cuda
