// SPDX-License-Identifier: Apache-2.0
// Tiles of A B^T, each handed to an epilogue and dropped:
//   void add_tile(products, a_panel, b_panel)   [MR, NR], kNoProduct where a row is not there
//   void end_strip(a_panel)                     after at most kStripPanels tiles of these rows of A
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
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

// The kernels of a loss.
struct ContrastEngine {
    const Kernels& kernels;
    const ContrastKernels& contrast;
    const TileKernels& tiles;

    // For features of these dtypes: bfloat16 only if all of them are.
    ContrastEngine(Isa isa, std::initializer_list<Dtype> dtypes)
        : kernels(kernels_for(isa)),
          contrast(kernels.contrast_kernels(
              std::all_of(dtypes.begin(),
                          dtypes.end(),
                          [](Dtype dtype) { return dtype == Dtype::kBfloat16; })
                  ? Dtype::kBfloat16
                  : Dtype::kFloat32)),
          tiles(kernels.tile_kernels(contrast.precision)) {}
};

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
                        const ContrastEngine& engine,
                        Execution& execution,
                        Panels& packed) {
    const TileKernels& tiles = engine.tiles;
    const RowKernels& row_kernels = engine.kernels.row_kernels(rows.dtype);
    const auto pack = which == Factor::kA ? tiles.pack_query : tiles.pack_row;
    packed.width = which == Factor::kA ? tiles.queries : tiles.rows;
    packed.words = tiles.words(rows.dim);
    packed.num_rows = num_rows;
    packed.num_panels = (num_rows + packed.width - 1) / packed.width;
    packed.values.reserve(packed.num_panels * packed.words * packed.width);
    execution.parallel_for(packed.num_panels, [&](std::int64_t p, int) {
        float* panel = packed.values.data() + p * packed.words * packed.width;
        const int count = packed.count(p);
        if (tiles.packed_values == 1) {
            // Some features at a time: what they are written to stays in the first-level cache.
            for (std::int64_t d = 0; d < rows.dim; d += kSumBlock) {
                const std::int64_t dim = std::min(kSumBlock, rows.dim - d);
                float* block = panel + d * packed.width;
                if (count < packed.width) {
                    std::fill_n(block, dim * packed.width, 0.0F);
                }
                for (int lane = 0; lane < count; ++lane) {
                    const void* row = rows.row(first_row + p * packed.width + lane, d);
                    row_kernels.load_floats(row, factor, dim, packed.width, block + lane);
                }
            }
            return;
        }
        std::vector<double> values(static_cast<std::size_t>(rows.dim));
        for (int lane = 0; lane < packed.width; ++lane) {
            if (lane < count) {
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

// What A and B are multiplied by when they are packed, and their products after that, for these to
// be scale / ln 2 times what they were.
struct ProductFactors {
    double a, b;
    float products;
};

// Factors of equal length overflow last: A is multiplied by 2^shift, B divided by it. bfloat16
// features only keep their digits if they are multiplied by powers of two: these bring the largest
// norms to [1, 2), far above the subnormal numbers that tiles may take for zero.
inline ProductFactors product_factors(double scale,
                                      double a_norm,
                                      double b_norm,
                                      const ContrastEngine& engine) {
    constexpr double kTiny = 1e-150;
    const auto exponent = [&](double value) { return std::ilogb(std::max(value, kTiny)); };
    const double factor = scale * kLog2E;
    if (engine.contrast.scale != nullptr) {
        const int a = exponent(a_norm);
        const int b = exponent(b_norm);
        return {std::ldexp(1.0, -a),
                std::ldexp(1.0, -b),
                static_cast<float>(std::ldexp(factor, a + b))};
    }
    const int shift = (exponent(b_norm) - exponent(a_norm * std::abs(factor))) / 2;
    return {std::ldexp(factor, shift), std::ldexp(1.0, -shift), 1.0F};
}

// The factors, after checks that no product can pass `limit`.
inline ProductFactors checked_factors(const char* op,
                                      const Rows& a,
                                      const Rows& b,
                                      double scale,
                                      double limit,
                                      const ContrastEngine& engine,
                                      Execution& execution) {
    constexpr double kLargestScale = 1e36;
    PYFEAT_CHECK(a.dim == b.dim, op, ": a and b must have the same width");
    PYFEAT_CHECK(std::abs(scale) <= kLargestScale,
                 op,
                 ": scale must be at most 1e36 in magnitude, got ",
                 scale);
    const double a_norm = largest_norm(a, op, "a", engine.kernels, execution);
    const double b_norm = largest_norm(b, op, "b", engine.kernels, execution);
    const double largest = a_norm * b_norm * std::abs(scale);
    PYFEAT_CHECK(largest <= limit,
                 op,
                 ": scale |a| |b| must be at most ",
                 limit,
                 " for the longest rows, got ",
                 largest);
    return product_factors(scale, a_norm, b_norm, engine);
}

// The tile of a panel of A and one of B, [MR, NR].
inline void multiply_tile(const ContrastEngine& engine,
                          std::int64_t words,
                          const float* a_panel,
                          const float* b_panel,
                          float factor,
                          float* products) {
    engine.tiles.multiply(words, a_panel, b_panel, products);
    if (engine.contrast.scale != nullptr) {
        engine.contrast.scale(products, factor);
    }
}

template <typename Epilogue>
class ProductTiles {
  public:
    ProductTiles(const ContrastEngine& engine,
                 const Panels& a,
                 const Panels& b,
                 float factor,
                 Execution& execution)
        : engine_(engine),
          tiles_(engine.tiles),
          a_(a),
          b_(b),
          factor_(factor),
          execution_(execution) {
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
        const auto copy = engine_.kernels.powers.copy_past_caches;
        for (std::int64_t first = b_panels.first; first < b_panels.end; first += strip_) {
            const std::int64_t end = std::min(b_panels.end, first + strip_);
            for (std::int64_t i = a_panels.first; i < a_panels.end; ++i) {
                if (execution_.stop_requested()) {
                    return;
                }
                const TileUse use(tiles_);
                for (std::int64_t j = first; j < end; ++j) {
                    alignas(64) float products[kMaxTileQueries * kMaxTileRows];
                    multiply_tile(engine_, a_.words, a_.panel(i), b_.panel(j), factor_, products);
                    if (first_a_panel_ + i < kept_.num_panels) {
                        const std::int64_t size = tiles_.queries * tiles_.rows;
                        const std::int64_t tile =
                            (first_a_panel_ + i) * num_b_panels_ + first_b_panel_ + j;
                        copy(products, size, kept_.products + tile * size);
                    }
                    hide_missing(a_.count(i), b_.count(j), products);
                    epilogue.add_tile(products, i, j);
                }
                epilogue.end_strip(i);
            }
        }
        std::atomic_thread_fence(std::memory_order_seq_cst);  // copies reach other threads
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

    const ContrastEngine& engine_;
    const TileKernels& tiles_;
    const Panels& a_;
    const Panels& b_;
    float factor_;
    Execution& execution_;
    std::int64_t strip_;
    KeptTiles kept_;
    std::int64_t first_a_panel_ = 0, first_b_panel_ = 0, num_b_panels_ = 0;
};

}  // namespace pyfeat
