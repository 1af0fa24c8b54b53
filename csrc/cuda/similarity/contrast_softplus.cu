// SPDX-License-Identifier: Apache-2.0
#include "cuda/similarity/pair_tiles.cuh"
#include "cuda/similarity/softplus.cuh"

namespace pyfeat::cuda {
template <int M, int N>
using SoftplusOfBfloat16 = SoftplusEpilogue<M, N, __nv_bfloat16>;
template <int M, int N>
using SoftplusOfFloat16 = SoftplusEpilogue<M, N, __half>;
template <int M, int N>
using SoftplusOfFloat32 = SoftplusEpilogue<M, N, float>;

void pair_softplus(const PairSoftplusCall& call, const Queue& queue) {
    const Site site = site_of("pair_softplus", call.pair, queue);
    const DeviceGuard guard(site);
    const SoftplusTileParams params{similarity_params(call.pair, call.pairs, call.scale, 1.0),
                                    call.bias,
                                    call.parts,
                                    plan_pairs(call.pair, queue).row_slots,
                                    call.weights,
                                    gradient_tiles(call.gradient, call.pair)};
    launch_pairs<SoftplusOfBfloat16, SoftplusOfFloat16, SoftplusOfFloat32>(
        site, call.pair, schedule_of(call.pair, site), params);
}

}  // namespace pyfeat::cuda
