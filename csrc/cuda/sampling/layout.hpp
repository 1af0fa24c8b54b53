// SPDX-License-Identifier: Apache-2.0
// How a call of deformable attention is laid out for its kernels.
#pragma once

#include "cuda/launch.hpp"
#include "cuda/sampling/sampling.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

Sampling to_sampling(const DeformAttnParams& params);
// Whether all rows of channels, of values and of features [B, Q, H, D], can be read 16 bytes at a
// time.
bool has_wide_rows(const DeformAttnParams& params, const void* features);
// Threads that share the channels of a row, each `width` at a time.
int team_of(const DeformAttnParams& params, int width);
QueryBlocks query_blocks(const DeformAttnParams& params, int width);
Launch launch_of(const DeformAttnParams& params, const QueryBlocks& blocks);

}  // namespace pyfeat::cuda
