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

#include "cpu/isa.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

constexpr std::int64_t kStripPanels = 16;

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
    constexpr std::int64_t kPerTask = 1024;
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

// A range of panels.
struct PanelRange {
    std::int64_t first, end;
};

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
};

}  // namespace pyfeat
