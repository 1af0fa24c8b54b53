// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// output: [B, Q, H, D] of Real.
void deform_attn_cpu(const DeformAttnParams& params, void* output, Isa isa, Execution& execution);

void deform_attn_backward_cpu(const DeformAttnParams& params,
                              const DeformAttnGradients& gradients,
                              Isa isa,
                              Execution& execution);

// Gradients of the sum of products of the first gradients with their cotangents; not of a softmax.
void deform_attn_second_cpu(const DeformAttnParams& params,
                            const DeformAttnSecond& second,
                            const DeformAttnGradients& gradients,
                            Isa isa,
                            Execution& execution);

}  // namespace pyfeat
