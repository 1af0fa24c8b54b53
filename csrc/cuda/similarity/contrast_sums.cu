// SPDX-License-Identifier: Apache-2.0
#include "cuda/similarity/pair_tiles.cuh"
#include "cuda/similarity/sums.cuh"

namespace pyfeat::cuda {
template <int M, int N>
using SumsOf16Bits = SumsEpilogue<M, N, true>;
template <int M, int N>
using SumsOfFloat32 = SumsEpilogue<M, N, false>;

void pair_sums(const PairSumsCall& call, const Queue& queue) {
    const Site site = site_of("pair_sums", call.pair, queue);
    const DeviceGuard guard(site);
    const PairPlan plan = plan_pairs(call.pair, queue);
    TileSchedule schedule = schedule_of(call.pair, site);
    const auto panels_per_tile =
        static_cast<std::int32_t>(tile_columns_of(call.pair.dtype, site) / kPanelRows);
    SumsParams params{similarity_params(call.pair, call.pairs, call.scale, kLog2E),
                      {call.row_parts, plan.row_slots, call.pair.num_rows, 0},
                      {call.column_parts, plan.column_slots, call.pair.num_columns, 0},
                      call.ids,
                      call.largest,
                      call.on_diagonal,
                      panels_per_tile};
    if (call.on_diagonal) {
        schedule.diagonal_panels = panels_per_tile;
        params.rows.num_slots += plan.column_slots;
        params.columns = params.rows;
        params.columns.first_slot = plan.row_slots;
    }
    launch_pairs<SumsOf16Bits, SumsOf16Bits, SumsOfFloat32>(site, call.pair, schedule, params);
}

}  // namespace pyfeat::cuda
