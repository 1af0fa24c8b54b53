// SPDX-License-Identifier: Apache-2.0
#include "cuda/similarity/gradients.cuh"
#include "cuda/similarity/pair_tiles.cuh"

namespace pyfeat::cuda {
template <int M, int N>
using GradientOfBfloat16 = GradientEpilogue<M, N, __nv_bfloat16>;
template <int M, int N>
using GradientOfFloat16 = GradientEpilogue<M, N, __half>;
template <int M, int N>
using GradientOfFloat32 = GradientEpilogue<M, N, float>;

void pair_gradient(const PairGradientCall& call, const Queue& queue) {
    const Site site = site_of("pair_sums_backward", call.pair, queue);
    const DeviceGuard guard(site);
    const TileSchedule schedule = schedule_of(call.pair, site);
    const GradientParams params{similarity_params(call.pair, call.pairs, call.scale, kLog2E),
                                {call.row_terms, call.row_plane},
                                {call.column_terms, call.column_plane},
                                gradient_tiles(call.gradient, call.pair),
                                call.sums,
                                schedule.ranges};
    launch_pairs<GradientOfBfloat16, GradientOfFloat16, GradientOfFloat32>(
        site, call.pair, schedule, params);
}

}  // namespace pyfeat::cuda
