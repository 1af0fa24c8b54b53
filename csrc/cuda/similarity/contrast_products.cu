// SPDX-License-Identifier: Apache-2.0
#include "cuda/similarity/add.cuh"
#include "cuda/similarity/pair_tiles.cuh"

namespace pyfeat::cuda {

void add_product(const AddProductCall& call, const Queue& queue) {
    const Site site = site_of("add_product", call.pair, queue);
    const DeviceGuard guard(site);
    const AddParams params{call.out, call.stride, call.pair.num_rows, call.pair.num_columns};
    launch_pairs<AddEpilogue, AddEpilogue, AddEpilogue>(
        site, call.pair, schedule_of(call.pair, site), params);
}

}  // namespace pyfeat::cuda
