// SPDX-License-Identifier: Apache-2.0
// Checks the arithmetic of levels that kernels of GPUs share with the host: places and corners of
// points against plain double arithmetic, and blocks of queries. Prints what is wrong; exits with 1
// then.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "sampling/levels.hpp"

namespace {

using namespace pyfeat;

int num_wrong = 0;

void expect(bool right, const char* what, int dims, double p) {
    if (!right) {
        std::printf("%s is wrong, %d-D, location %g\n", what, dims, p);
        ++num_wrong;
    }
}

// Cells along one axis with what they weigh, and the derivatives of that, by definition.
struct Neighbours {
    std::map<int, double> shares, slopes;
};

Neighbours neighbours(double p, int extent, const SamplingModes& modes) {
    Neighbours found;
    if (std::isnan(p) || extent == 0) {
        return found;
    }
    if (modes.discrete) {
        found.shares[static_cast<int>(std::fmin(std::fmax(p * extent + 0.5, 0.0), extent - 1))] = 1;
        return found;
    }
    const double factor = modes.align_corners ? extent - 1 : extent;
    double u = p * factor - (modes.align_corners ? 0.0 : 0.5), slope = factor;
    if (modes.border) {
        slope = u > 0 && u < extent - 1 ? factor : 0.0;
        u = std::fmin(std::fmax(u, 0.0), extent - 1);
    }
    if (!(u >= -1 && u < extent)) {
        return found;
    }
    const int low = static_cast<int>(std::floor(u));
    for (int cell = low; cell <= low + 1; ++cell) {
        if (cell >= 0 && cell < extent) {
            found.shares[cell] = cell == low ? 1 - (u - low) : u - low;
            found.slopes[cell] = cell == low ? -slope : slope;
        }
    }
    return found;
}

template <int kDims>
void check_spot(const Level& level, const double (&p)[3], const SamplingModes& modes) {
    double location[kDims];
    Neighbours along[kDims];
    for (int j = 0; j < kDims; ++j) {
        location[j] = p[j];
        along[j] = neighbours(p[j], level.sizes[j], modes);
    }
    const auto spot = spot_of<double, kDims>(location, level, modes);
    std::map<int, std::vector<double>> wanted, found;
    std::vector<std::pair<int, std::vector<double>>> partial{
        {0, std::vector<double>(1 + kDims, 1.0)}};
    for (int j = 0, stride = 1; j < kDims; stride *= level.sizes[j], ++j) {
        std::vector<std::pair<int, std::vector<double>>> next;
        for (const auto& [cell, terms] : partial) {
            for (const auto& [at, share] : along[j].shares) {
                std::vector<double> product = terms;
                for (int k = 0; k <= kDims; ++k) {
                    product[static_cast<std::size_t>(k)] *=
                        k == j + 1 ? along[j].slopes[at] : share;
                }
                next.emplace_back(cell + at * stride, product);
            }
        }
        partial = next;
    }
    for (const auto& [cell, terms] : partial) {
        wanted[cell] = terms;
    }
    for (int e = 0; e < 1 << kDims; ++e) {
        if (has_corner(spot.corners, e)) {
            std::vector<double> terms{corner_share<kDims>(spot.above, e)};
            for (int j = 0; j < kDims; ++j) {
                terms.push_back(spot.slopes[j] * corner_share<kDims>(spot.above, e, j));
            }
            found[spot.cell + corner_offset<kDims>(level, e)] = terms;
        }
    }
    bool right = wanted.size() == found.size();
    for (const auto& [cell, terms] : wanted) {
        right = right && found.count(cell) != 0;
        for (std::size_t k = 0; right && k < terms.size(); ++k) {
            right = std::abs(terms[k] - found[cell][k]) < 1e-12;
        }
    }
    expect(right, "a spot", kDims, p[0]);
}

void check_spots() {
    // Of a level of 5: inside, on cells, at the ends, in the margin, out of range, not to be
    // reached.
    const double positions[] = {0.0,
                                0.1,
                                0.37,
                                0.5,
                                0.9,
                                1.0,
                                -0.1,
                                1.1,
                                -0.05,
                                -0.3,
                                1.2999,
                                1.3,
                                -1e9,
                                1e30,
                                -INFINITY,
                                INFINITY,
                                NAN};
    const Level levels[] = {
        {{5, 1, 1}, 1}, {{5, 3, 1}, 1}, {{5, 3, 4}, 1}, {{1, 1, 1}, 1}, {{0, 3, 2}, 1}};
    for (int options = 0; options < 8; ++options) {
        const SamplingModes modes{
            (options & 1) != 0, (options & 2) != 0, (options & 4) != 0, false};
        for (const double x : positions) {
            for (const double y : positions) {
                for (const Level& level : levels) {
                    if (level.sizes[1] == 1 && level.sizes[2] == 1) {
                        check_spot<1>(level, {x, y, 0.5}, modes);
                    }
                    if (level.sizes[2] == 1) {
                        check_spot<2>(level, {x, y, 0.5}, modes);
                    }
                    check_spot<3>(level, {x, y, 0.3}, modes);
                    check_spot<3>(level, {0.6, y, x}, modes);
                }
            }
        }
    }
}

// Every query is in one place of one tile, and tiles are boxes.
void check_tiles(const Levels& levels, int num_queries, int dims) {
    const QueryTile tile = query_tile(num_queries, dims);
    expect(tile.sizes[0] * tile.sizes[1] * tile.sizes[2] == num_queries, "a tile", dims, 0);
    expect(tile.sizes[0] >= tile.sizes[1] && tile.sizes[1] >= tile.sizes[2], "a box", dims, 0);
    expect(tile.sizes[0] <= 4 * tile.sizes[dims - 1], "a long tile", dims, 0);
    std::int64_t tiles = 0, cells = 0;
    for (int l = 0; l < levels.count; ++l) {
        tiles += num_tiles(levels.items[l], tile);
        cells += levels.items[l].num_cells();
    }
    std::vector<int> taken(static_cast<std::size_t>(cells));
    for (std::int64_t index = 0; index < tiles + 2; ++index) {
        for (int place = 0; place < num_queries; ++place) {
            const std::int64_t query = query_of_tile(levels, tile, index, place);
            expect(query < cells && (query < 0 || index < tiles), "a query", dims, 0);
            if (query >= 0 && query < cells) {
                ++taken[static_cast<std::size_t>(query)];
            }
        }
    }
    for (const int times : taken) {
        expect(times == 1, "a count of queries", dims, 0);
    }
    // Neighbours along x and, a row of the level further, along y.
    expect(query_of_tile(levels, tile, 0, 1) == (tile.sizes[0] > 1 ? 1 : levels.items[0].sizes[0]),
           "a neighbour",
           dims,
           0);
}

}  // namespace

int main() {
    check_spots();
    const Levels plane{3, {{{7, 5, 1}, 1}, {{0, 3, 1}, 1}, {{4, 9, 1}, 1}}};
    const Levels space{2, {{{7, 5, 3}, 1}, {{2, 1, 9}, 1}}};
    for (int num_queries = 2; num_queries <= 256; num_queries *= 2) {
        check_tiles(plane, num_queries, 2);
        check_tiles(space, num_queries, 3);
    }
    std::printf("%d wrong\n", num_wrong);
    return num_wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
