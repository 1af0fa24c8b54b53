// SPDX-License-Identifier: Apache-2.0
// Tiles of A B^T in float32, each handed to an epilogue and dropped:
//   void add_tile(products, a_panel, b_panel)   [MR, NR], kNoProduct where a row is not there
//   void end_strip(a_panel)                     after at most kStripPanels tiles of these rows of A
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cpu/isa.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

constexpr std::int64_t kStripPanels = 16;

// Of scale |a| |b|, so that float32 holds all products in powers of two.
constexpr double kLargestProduct = 1e36;

constexpr double kLog2E = 1.44269504088896340736;  // 1 / ln 2

// Rows of one factor, `width` to a panel; the last panel is filled up with zeros.
struct Panels {
    std::int64_t num_rows = 0, num_panels = 0, words = 0;
    int width = 0;
    AlignedFloats values;  // [num_panels, words, width]

    const float* panel(std::int64_t index) const {
        return values.data() + index * words * width;
    }
    // Rows of one panel that are there.
    int count(std::int64_t index) const {
        return static_cast<int>(std::min<std::int64_t>(width, num_rows - index * width));
    }
};

enum class Factor { kA, kB };

// Packs `factor` times the rows from first_row on, taken in float64 and rounded once.
inline void pack_factor(const Rows& rows,
                        std::int64_t first_row,
                        std::int64_t num_rows,
                        double factor,
                        Factor which,
                        const Kernels& kernels,
                        Execution& execution,
                        Panels& packed) {
    const TileKernels& tiles = kernels.tile_kernels(Precision::kFloat32);
    const RowKernels& row_kernels = kernels.row_kernels(rows.dtype);
    const auto pack = which == Factor::kA ? tiles.pack_query : tiles.pack_row;
    packed.width = which == Factor::kA ? tiles.queries : tiles.rows;
    packed.words = tiles.words(rows.dim);
    packed.num_rows = num_rows;
    packed.num_panels = (num_rows + packed.width - 1) / packed.width;
    packed.values.reserve(packed.num_panels * packed.words * packed.width);
    execution.parallel_for(packed.num_panels, [&](std::int64_t p, int) {
        std::vector<double> values(static_cast<std::size_t>(rows.dim));
        float* panel = packed.values.data() + p * packed.words * packed.width;
        for (int lane = 0; lane < packed.width; ++lane) {
            if (lane < packed.count(p)) {
                const void* row = rows.row(first_row + p * packed.width + lane);
                row_kernels.load(row, factor, rows.dim, values.data());
            } else {
                std::fill(values.begin(), values.end(), 0.0);
            }
            pack(values.data(), rows.dim, 1.0, panel, lane);
        }
    });
}

// The largest norm of any row; throws for rows that are not usable.
inline double largest_norm(const Rows& rows,
                           const char* op,
                           const char* name,
                           const Kernels& kernels,
                           Execution& execution) {
    constexpr std::int64_t kPerTask = 128;
    const RowKernels& row_kernels = kernels.row_kernels(rows.dtype);
    const std::int64_t num_tasks = (rows.num_rows + kPerTask - 1) / kPerTask;
    std::vector<double> largest(static_cast<std::size_t>(num_tasks), 0.0);
    std::vector<std::int64_t> unusable(static_cast<std::size_t>(num_tasks), -1);
    execution.parallel_for(num_tasks, [&](std::int64_t task, int) {
        const std::int64_t end = std::min(rows.num_rows, (task + 1) * kPerTask);
        for (std::int64_t i = task * kPerTask; i < end; ++i) {
            const double squared = row_kernels.squared_norm(rows.row(i), rows.dim);
            if (!is_usable(squared)) {
                unusable[static_cast<std::size_t>(task)] = i;
                return;
            }
            largest[static_cast<std::size_t>(task)] =
                std::max(largest[static_cast<std::size_t>(task)], squared);
        }
    });
    double squared = 0.0;
    for (std::size_t task = 0; task < largest.size(); ++task) {
        if (unusable[task] >= 0) {
            refuse_row(op, name, rows.dtype, unusable[task]);
        }
        squared = std::max(squared, largest[task]);
    }
    return std::sqrt(squared);
}

// What A and B are multiplied by for their product to be scale / ln 2 times what it was. Factors of
// equal length overflow last: A is multiplied by 2^shift, B divided by it.
inline std::pair<double, double> product_factors(double scale, double a_norm, double b_norm) {
    constexpr double kTiny = 1e-150;
    const double factor = scale * kLog2E;
    const int shift = (std::ilogb(std::max(b_norm, kTiny)) -
                       std::ilogb(std::max(a_norm * std::abs(factor), kTiny))) /
                      2;
    return {std::ldexp(factor, shift), std::ldexp(1.0, -shift)};
}

// The factors, after checks that no product can pass `limit`.
inline std::pair<double, double> checked_factors(const char* op,
                                                 const Rows& a,
                                                 const Rows& b,
                                                 double scale,
                                                 double limit,
                                                 const Kernels& kernels,
                                                 Execution& execution) {
    constexpr double kLargestScale = 1e36;
    PYFEAT_CHECK(a.dim == b.dim, op, ": a and b must have the same width");
    PYFEAT_CHECK(std::abs(scale) <= kLargestScale,
                 op,
                 ": scale must be at most 1e36 in magnitude, got ",
                 scale);
    const double a_norm = largest_norm(a, op, "a", kernels, execution);
    const double b_norm = largest_norm(b, op, "b", kernels, execution);
    const double largest = a_norm * b_norm * std::abs(scale);
    PYFEAT_CHECK(largest <= limit,
                 op,
                 ": scale |a| |b| must be at most ",
                 limit,
                 " for the longest rows, got ",
                 largest);
    return product_factors(scale, a_norm, b_norm);
}

template <typename Epilogue>
class ProductTiles {
  public:
    ProductTiles(const TileKernels& tiles, const Panels& a, const Panels& b, Execution& execution)
        : tiles_(tiles), a_(a), b_(b), execution_(execution) {
        // Half of the second-level cache holds a strip of B while the panels of A pass over it.
        const std::int64_t panel_bytes = std::max<std::int64_t>(4 * b.words * b.width, 1);
        strip_ =
            std::clamp<std::int64_t>(second_level_cache_bytes() / 2 / panel_bytes, 1, kStripPanels);
    }

    // Keeps the tiles too; the panels here are those from these on, of so many panels of B.
    void keep(const KeptTiles& kept,
              std::int64_t first_a_panel,
              std::int64_t first_b_panel,
              std::int64_t num_b_panels) {
        kept_ = kept;
        first_a_panel_ = first_a_panel;
        first_b_panel_ = first_b_panel;
        num_b_panels_ = num_b_panels;
    }

    // Returns early if asked to stop.
    void run(PanelRange a_panels, PanelRange b_panels, Epilogue& epilogue) const {
        for (std::int64_t first = b_panels.first; first < b_panels.end; first += strip_) {
            const std::int64_t end = std::min(b_panels.end, first + strip_);
            for (std::int64_t i = a_panels.first; i < a_panels.end; ++i) {
                if (execution_.stop_requested()) {
                    return;
                }
                const TileUse use(tiles_);
                for (std::int64_t j = first; j < end; ++j) {
                    alignas(64) float products[kMaxTileQueries * kMaxTileRows];
                    tiles_.multiply(a_.words, a_.panel(i), b_.panel(j), products);
                    if (first_a_panel_ + i < kept_.num_panels) {
                        const std::int64_t size = tiles_.queries * tiles_.rows;
                        const std::int64_t tile =
                            (first_a_panel_ + i) * num_b_panels_ + first_b_panel_ + j;
                        std::copy_n(products, size, kept_.products + tile * size);
                    }
                    hide_missing(a_.count(i), b_.count(j), products);
                    epilogue.add_tile(products, i, j);
                }
                epilogue.end_strip(i);
            }
        }
    }

  private:
    // Sets the products of rows that are not there to kNoProduct.
    void hide_missing(int num_rows, int num_columns, float* products) const {
        if (num_rows == tiles_.queries && num_columns == tiles_.rows) {
            return;
        }
        for (int r = 0; r < tiles_.queries; ++r) {
            float* row = products + r * tiles_.rows;
            std::fill(row + (r < num_rows ? num_columns : 0), row + tiles_.rows, kNoProduct);
        }
    }

    const TileKernels& tiles_;
    const Panels& a_;
    const Panels& b_;
    Execution& execution_;
    std::int64_t strip_;
    KeptTiles kept_;
    std::int64_t first_a_panel_ = 0, first_b_panel_ = 0, num_b_panels_ = 0;
};

}  // namespace pyfeat
