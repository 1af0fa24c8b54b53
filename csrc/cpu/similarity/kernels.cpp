// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set.
#include "cpu/similarity/kernels.hpp"

#include "cpu/similarity/distances.hpp"
#include "cpu/similarity/tile.hpp"

namespace pyfeat::PYFEAT_ISA_NAMESPACE {

static_assert(kTileQueries <= kMaxTileQueries && kTileRows <= kMaxTileRows);

const Kernels kernels{
    kTileQueries,
    kTileRows,
    tile_product,
    mark_scores,
    pack_row,
    squared_norm,
    dot,
    squared_distance,
    farthest_pass,
};

}  // namespace pyfeat::PYFEAT_ISA_NAMESPACE
