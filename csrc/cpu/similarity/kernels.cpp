// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set.
#include "cpu/similarity/kernels.hpp"

#include "cpu/similarity/distances.hpp"
#if defined(PYFEAT_ISA_AVX512_BF16)
#include "cpu/similarity/tile_bf16.hpp"
#else
#include "cpu/similarity/tile_float32.hpp"
#endif

namespace pyfeat::PYFEAT_ISA_NAMESPACE {

static_assert(kTileQueries <= kMaxTileQueries && kTileRows <= kMaxTileRows);

const Kernels kernels{
    kTileQueries,
    kTileRows,
    kPackedValues,
    tile_product,
    mark_scores,
    pack_row,
    squared_norm,
    dot,
    squared_distance,
    farthest_pass,
};

}  // namespace pyfeat::PYFEAT_ISA_NAMESPACE
