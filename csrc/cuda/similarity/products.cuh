// SPDX-License-Identifier: Apache-2.0
// Launches the engine of tile products (engine.cuh).
#pragma once

#include "check.hpp"
#include "cuda/build.hpp"
#include "cuda/launch.hpp"
#include "cuda/similarity/products_mma.cuh"
#include "cuda/similarity/products_wgmma.cuh"

namespace pyfeat::cuda {

// Whether tiles come from wgmma on the device of a site.
inline bool has_wgmma(const Site& site) {
    return capability(site) == 90 && is_built_for("90a");
}

inline int tile_columns(const Site& site) {
    return has_wgmma(site) ? WgmmaTile::kColumns : MmaTile::kColumns;
}

// Every tile_step-th tile of A B^T, as tasks for the device of a site.
inline TileSchedule plan_products(const Site& site,
                                  const Panels& a,
                                  const Panels& b,
                                  std::int64_t tile_step = 1) {
    return plan_tiles(
        a.num_panels, b.num_panels, tile_columns(site), tile_step, num_multiprocessors(site));
}

template <typename Tile, typename Operand, typename Params>
void launch_tiles(const Site& site,
                  void (*kernel)(Operand, Operand, TileSchedule, Params),
                  int scratch_bytes,
                  const Operand& a,
                  const Operand& b,
                  const TileSchedule& schedule,
                  const Params& params) {
    const std::int64_t workers = num_multiprocessors(site), tasks = schedule.num_tasks();
    Launch config;
    config.grid = dim3(static_cast<unsigned>(tasks < workers ? tasks : workers));
    config.block = dim3(Tile::kThreads);
    config.shared_bytes = static_cast<std::size_t>(Tile::kSharedBytes + scratch_bytes);
    launch(site, config, kernel, a, b, schedule, params);
}

// Gives the tiles of a schedule, made by plan_products for the same site, to an epilogue. B has an
// even number of panels.
template <template <int, int> class Epilogue>
void launch_tile_products(const Site& site,
                          const Panels& a,
                          const Panels& b,
                          const TileSchedule& schedule,
                          const typename MmaEpilogue<Epilogue>::Params& params) {
    PYFEAT_CHECK(a.num_blocks == b.num_blocks && b.num_panels % 2 == 0,
                 site.op,
                 ": operands of tile products must have as many blocks and pairs of panels, got ",
                 a.num_blocks,
                 " and ",
                 b.num_blocks,
                 " blocks, ",
                 b.num_panels,
                 " panels");
    if (has_wgmma(site)) {
        launch_tiles<WgmmaTile>(site,
                                tile_products_wgmma<Epilogue>,
                                WgmmaEpilogue<Epilogue>::kScratchBytes,
                                a,
                                b,
                                schedule,
                                params);
    } else {
        launch_tiles<MmaTile>(site,
                              tile_products_mma<Epilogue>,
                              MmaEpilogue<Epilogue>::kScratchBytes,
                              a,
                              b,
                              schedule,
                              params);
    }
}

}  // namespace pyfeat::cuda
