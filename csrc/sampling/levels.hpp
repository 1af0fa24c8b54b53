// SPDX-License-Identifier: Apache-2.0
// Levels of deformable attention, where points lie on them, and which queries a block of threads
// takes. Plain arithmetic for both sides; axes are x, y, z.
#pragma once

#include <cstdint>

#include "host_device.hpp"
#include "params.hpp"
#include "sampling/place.hpp"

namespace pyfeat {

struct Level {
    std::int32_t sizes[kMaxDims];  // x, y, z; 1 for axes that are missing
    std::int32_t num_points;

    PYFEAT_HOST_DEVICE std::int32_t num_cells() const {
        return sizes[0] * sizes[1] * sizes[2];
    }
};

// Levels of one launch: they travel with its arguments.
constexpr int kMaxLevels = 64;

struct Levels {
    std::int32_t count;
    Level items[kMaxLevels];
};

struct SamplingModes {
    bool border, align_corners, discrete, softmax;
};

// Corners that take the lower cell of an axis, or the higher one: those whose bit is not set, or
// is.
PYFEAT_HOST_DEVICE constexpr std::int32_t corners_of_side(int axis, bool high) {
    const std::int32_t of_axis[kMaxDims] = {0xAA, 0xCC, 0xF0};
    return high ? of_axis[axis] : 0xFF ^ of_axis[axis];
}

// Where a point lies on its level. Corner e takes the higher cell along the axes of the bits of e.
template <typename Real, int kDims>
struct Spot {
    std::int32_t cell;     // the number of corner 0, which need not be there
    std::int32_t corners;  // bit e: whether corner e is; without any a point adds nothing
    Real above[kDims];     // how far it is from the lower cell of an axis to the higher one
    Real slopes[kDims];    // of its position by its location; 0 where clipped
};

template <typename Real, int kDims>
PYFEAT_HOST_DEVICE inline Spot<Real, kDims> spot_of(const Real* location,
                                                    const Level& level,
                                                    const SamplingModes& modes) {
    Spot<Real, kDims> spot{};
    spot.corners = modes.discrete ? 1 : (1 << (1 << kDims)) - 1;
    std::int32_t stride = 1;
    for (int j = 0; j < kDims; ++j) {
        const std::int32_t extent = level.sizes[j];
        const Real p = location[j], length = static_cast<Real>(extent);
        std::int32_t cell;
        if (modes.discrete) {
            cell = place_discrete(p, length);
        } else {
            const Real factor = modes.align_corners ? length - Real{1} : length;
            const Real shift = modes.align_corners ? Real{0} : Real{0.5};
            const auto place = modes.border ? place_linear<true>(p, factor, shift, length)
                                            : place_linear<false>(p, factor, shift, length);
            cell = static_cast<std::int32_t>(place.whole);
            spot.above[j] = place.above;
            spot.slopes[j] = factor * place.slope;
        }
        spot.cell += cell * stride;
        spot.corners &= is_below(cell, extent) ? 0xFF : corners_of_side(j, true);
        spot.corners &= is_below(cell + 1, extent) ? 0xFF : corners_of_side(j, false);
        stride *= extent;
    }
    return spot;
}

PYFEAT_HOST_DEVICE constexpr bool has_corner(std::int32_t corners, int corner) {
    return (corners >> corner & 1) != 0;
}

// From corner 0 to another, in cells.
template <int kDims>
PYFEAT_HOST_DEVICE constexpr std::int32_t corner_offset(const Level& level, int corner) {
    std::int32_t offset = 0, stride = 1;
    for (int j = 0; j < kDims; ++j) {
        offset += (corner >> j & 1) * stride;
        stride *= level.sizes[j];
    }
    return offset;
}

// The share of a corner in the value at a point; with an axis >= 0, its derivative along it.
template <int kDims, typename Real>
PYFEAT_HOST_DEVICE constexpr Real corner_share(const Real* above, int corner, int axis = -1) {
    Real share{1};
    for (int j = 0; j < kDims; ++j) {
        const bool high = (corner >> j & 1) != 0;
        if (j == axis) {
            share *= high ? Real{1} : Real{-1};
        } else {
            share *= high ? above[j] : Real{1} - above[j];
        }
    }
    return share;
}

// Queries that lie in a box of cells of one level; sizes are powers of two.
struct QueryTile {
    std::int32_t sizes[kMaxDims];
};

// As even a box of `num_queries` cells, a power of two, as powers of two make, longest along x.
PYFEAT_HOST_DEVICE constexpr QueryTile query_tile(int num_queries, int num_dims) {
    int bits = 0;
    while (1 << (bits + 1) <= num_queries) {
        ++bits;
    }
    QueryTile tile{{1, 1, 1}};
    for (int axis = num_dims - 1; axis >= 0; --axis) {
        const int taken = bits / (axis + 1);
        tile.sizes[axis] = 1 << taken;
        bits -= taken;
    }
    return tile;
}

PYFEAT_HOST_DEVICE constexpr std::int32_t tiles_along(const Level& level,
                                                      const QueryTile& tile,
                                                      int axis) {
    return (level.sizes[axis] + tile.sizes[axis] - 1) / tile.sizes[axis];
}

PYFEAT_HOST_DEVICE constexpr std::int64_t num_tiles(const Level& level, const QueryTile& tile) {
    return std::int64_t{1} * tiles_along(level, tile, 0) * tiles_along(level, tile, 1) *
           tiles_along(level, tile, 2);
}

// The query at a place of a tile, where queries are the cells of the levels; -1 if there is none.
PYFEAT_HOST_DEVICE constexpr std::int64_t query_of_tile(const Levels& levels,
                                                        const QueryTile& tile,
                                                        std::int64_t index,
                                                        std::int32_t place) {
    std::int64_t first = 0;
    for (std::int32_t l = 0; l < levels.count; ++l) {
        const Level& level = levels.items[l];
        const std::int64_t count = num_tiles(level, tile);
        if (index >= count) {
            index -= count;
            first += level.num_cells();
            continue;
        }
        std::int64_t cell = 0, stride = 1;
        for (int j = 0; j < kMaxDims; ++j) {
            const std::int32_t along = tiles_along(level, tile, j);
            const auto at =
                static_cast<std::int32_t>(index % along) * tile.sizes[j] + place % tile.sizes[j];
            if (at >= level.sizes[j]) {
                return -1;
            }
            cell += at * stride;
            stride *= level.sizes[j];
            index /= along;
            place /= tile.sizes[j];
        }
        return first + cell;
    }
    return -1;
}

}  // namespace pyfeat
