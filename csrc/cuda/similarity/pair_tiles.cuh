// SPDX-License-Identifier: Apache-2.0
// Launches the engine of tile products for losses: three dtypes, tiles of a block of pairs.
#pragma once

#include <string>

#include "cuda/similarity/contrast.hpp"
#include "cuda/similarity/pairs.hpp"
#include "cuda/similarity/products.cuh"
#include "cuda/similarity/products_float32.cuh"

namespace pyfeat::cuda {

inline Site site_of(const char* op, const PackedPair& pair, const Queue& queue) {
    const auto shape = [&](std::int64_t count) {
        return "[" + std::to_string(count) + ", " + std::to_string(pair.width) + "]";
    };
    return {op, "a " + shape(pair.num_rows) + ", b " + shape(pair.num_columns), queue};
}

// Only bfloat16 has tiles from wgmma.
inline bool has_wide_tiles(Dtype dtype, const Site& site) {
    return dtype == Dtype::kBfloat16 && has_wgmma(site);
}
inline std::int64_t tile_columns_of(Dtype dtype, const Site& site) {
    return has_wide_tiles(dtype, site) ? WgmmaTile::kColumns : MmaTile::kColumns;
}
// Fragments of rows of a warp; there are as many warps beside each other.
inline int row_fragments(Dtype dtype, const Site& site) {
    return has_wide_tiles(dtype, site) ? WgmmaTile::kRowFragments : MmaTile::kRowFragments;
}

inline TileSchedule schedule_of(const PackedPair& pair, const Site& site) {
    return plan_tiles(ceil_div(pair.num_rows, kPanelRows),
                      ceil_div(pair.num_columns, kPanelRows),
                      tile_columns_of(pair.dtype, site),
                      1,
                      num_multiprocessors(site));
}

inline SimilarityParams similarity_params(const PackedPair& pair,
                                          const PairTerms& pairs,
                                          const double* scale,
                                          double unit) {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    PYFEAT_CHECK(pair.num_rows <= kMost && pair.num_columns <= kMost,
                 "pair_sums: a launch must have at most 2^30 rows and columns, got ",
                 pair.num_rows,
                 " and ",
                 pair.num_columns);
    return {pairs,
            scale,
            unit,
            static_cast<std::int32_t>(pair.num_rows),
            static_cast<std::int32_t>(pair.num_columns)};
}

inline std::int32_t panels_of(std::int64_t num_rows) {
    return static_cast<std::int32_t>(ceil_div(num_rows, kPanelRows));
}

// Gives all tiles of a schedule to the epilogue of the dtype.
template <template <int, int> class OfBfloat16,
          template <int, int> class OfFloat16,
          template <int, int> class OfFloat32,
          typename Params>
void launch_pairs(const Site& site,
                  const PackedPair& pair,
                  const TileSchedule& schedule,
                  const Params& params) {
    PYFEAT_CHECK(pair.width > 0, site.op, ": packed rows must have columns, got ", site.shapes);
    if (pair.dtype == Dtype::kFloat32) {
        const auto blocks = static_cast<std::int32_t>(pair.width / kFloatColumns);
        const auto of = [&](const void* values, std::int64_t num_rows) {
            return FloatPanels{static_cast<const float*>(values), panels_of(num_rows), blocks};
        };
        launch_tiles<FloatTile>(site,
                                tile_products_float32<OfFloat32>,
                                MmaEpilogue<OfFloat32>::kScratchBytes,
                                of(pair.a, pair.num_rows),
                                of(pair.b, pair.num_columns),
                                schedule,
                                params);
        return;
    }
    const auto blocks = static_cast<std::int32_t>(pair.width / kBlockColumns);
    // Of an odd number of panels the next one is there as well: of the matrix, or of zeros.
    const std::int32_t b_panels = (panels_of(pair.num_columns) + 1) / 2 * 2;
    const Panels a{static_cast<const std::uint16_t*>(pair.a), panels_of(pair.num_rows), blocks};
    const Panels b{static_cast<const std::uint16_t*>(pair.b), b_panels, blocks};
    if (pair.dtype == Dtype::kBfloat16) {
        launch_tile_products<OfBfloat16>(site, a, b, schedule, params);
    } else {
        PYFEAT_CHECK(pair.dtype == Dtype::kFloat16, site.op, ": features must be floats");
        launch_tiles<MmaTile>(site,
                              tile_products_mma_f16<OfFloat16>,
                              MmaEpilogue<OfFloat16>::kScratchBytes,
                              a,
                              b,
                              schedule,
                              params);
    }
}

}  // namespace pyfeat::cuda
