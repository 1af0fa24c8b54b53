// SPDX-License-Identifier: Apache-2.0
// Products with a matrix dS [L, S] that exists in blocks only: tiles of S = A B^T are computed,
// an epilogue turns them into dS, and both products take each block before it is dropped.
//
// An epilogue has a type `Strip`, made from (epilogue, first row) for the tiles of one panel of A:
//   void add(products, column, num_columns, gradient)  of the tile that starts in this column
//   void end()
// gradient is [MR, .] of stride kGradientStride.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "cpu/similarity/gradient_factors.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/products.hpp"
#include "cpu/similarity/schedule.hpp"
#include "cpu/similarity/shifted_sums.hpp"
#include "params.hpp"

namespace pyfeat {

// The kernels for features and values of one dtype, or of several.
inline ContrastEngine gradient_engine(Isa isa,
                                      const Rows& a,
                                      const Rows& b,
                                      const PairProducts& products) {
    return {isa, {a.dtype, b.dtype, products.a_values.dtype, products.b_values.dtype}};
}

// The unit of a dS that is rounded to bfloat16, the largest of these weights: what all pairs of a
// kind weigh is not rounded then, and no upstream gradient is too small. 1 for one that is not.
inline double gradient_unit(const ContrastEngine& engine,
                            double scale,
                            std::initializer_list<std::pair<const double*, std::int64_t>> weights) {
    double largest = 0.0;
    for (const auto& [values, count] : weights) {
        for (std::int64_t i = 0; engine.contrast.round != nullptr && i < count; ++i) {
            largest = std::max(largest, std::abs(scale * values[i]));
        }
    }
    return largest > 0.0 && std::isfinite(largest) ? largest : 1.0;
}

// A and B, what they and their products are multiplied by, the unit of dS, and kept products.
struct PackedFactors {
    const Rows& a;
    const Rows& b;
    ProductFactors factors;
    double unit;
    KeptTiles kept;
};

// What a thread computes dS of some rows and columns in.
struct GradientBlock {
    // [kGradientRows, kGradientStride], or the rows of one tile before they are rounded.
    AlignedFloats values;
    AlignedFloats column_pairs, row_pairs;
    const float* by_columns = nullptr;  // what dS is multiplied from
    const float* by_rows = nullptr;     // and its transpose

    void start(bool rounds) {
        values.reserve((rounds ? kMaxTileQueries : kGradientRows) * kGradientStride);
        if (rounds) {
            column_pairs.reserve(kGradientRows * kGradientStride);
            row_pairs.reserve(kGradientRows / 2 * kGradientStride);
        }
        by_columns = rounds ? column_pairs.data() : values.data();
        by_rows = rounds ? row_pairs.data() : values.data();
    }
};

template <typename Epilogue>
class GradientProducts {
  public:
    // itself: a and b are the same rows, values too, and dS is symmetric; only products.a is made.
    GradientProducts(const PackedFactors& factors,
                     const PairProducts& products,
                     bool itself,
                     Epilogue& epilogue,
                     const ContrastEngine& engine,
                     Execution& execution)
        : engine_(engine),
          contrast_(engine.contrast),
          tiles_(engine.tiles),
          execution_(execution),
          products_(products),
          epilogue_(epilogue),
          itself_(itself),
          num_rows_(factors.a.num_rows),
          num_columns_(factors.b.num_rows),
          factor_(factors.factors.products),
          kept_(factors.kept) {
        // With every tile kept there is nothing to multiply.
        if (itself || kept_.num_panels * tiles_.queries < num_rows_) {
            const ProductFactors& by = factors.factors;
            pack_factor(factors.a, 0, num_rows_, by.a, Factor::kA, engine, execution, a_);
            pack_factor(factors.b, 0, num_columns_, by.b, Factor::kB, engine, execution, b_);
        }
        if (products.a != nullptr) {
            pack_features(products.b_values, engine, execution, b_values_);
            a_sums_.start(
                factors.a, b_values_, contrast_.product_rows, factors.unit, products.a, execution);
        }
        if (products.b != nullptr) {
            pack_features(products.a_values, engine, execution, a_values_);
            b_sums_.start(
                factors.b, a_values_, contrast_.product_rows, factors.unit, products.b, execution);
        }
    }

    void run() {
        const PairSchedule schedule(num_rows_, num_columns_, tiles_, itself_);
        std::vector<GradientBlock> blocks(to_size(execution_.num_threads()));
        for (std::int64_t round = 0; round < schedule.num_rounds(); ++round) {
            const std::vector<PartPair> pairs = schedule.round(round);
            execution_.parallel_for(static_cast<std::int64_t>(pairs.size()),
                                    [&](std::int64_t task, int worker) {
                                        GradientBlock& block = blocks[to_size(worker)];
                                        block.start(contrast_.round != nullptr);
                                        add_part(pairs[to_size(task)], block);
                                    });
        }
        if (products_.a != nullptr) {
            a_sums_.write(execution_);
        }
        if (products_.b != nullptr) {
            b_sums_.write(execution_);
        }
    }

  private:
    void add_part(const PartPair& pair, GradientBlock& block) {
        const std::int64_t height =
            even_chunk(pair.rows.end - pair.rows.first, kGradientRows, tiles_.queries);
        const std::int64_t width =
            even_chunk(pair.columns.end - pair.columns.first, kGradientColumns, tiles_.rows);
        for (std::int64_t column = pair.columns.first; column < pair.columns.end; column += width) {
            for (std::int64_t row = pair.rows.first; row < pair.rows.end; row += height) {
                if (execution_.stop_requested()) {
                    return;
                }
                add_block({row, std::min(pair.rows.end, row + height)},
                          {column, std::min(pair.columns.end, column + width)},
                          pair,
                          block);
            }
        }
    }

    // The block of dS is used for both products and dropped. What fills up the last panels meets
    // zeros or is never multiplied, and its sums are not written out.
    void add_block(PanelRange rows,
                   PanelRange columns,
                   const PartPair& pair,
                   GradientBlock& block) {
        const TileUse use(tiles_);
        fill_block(rows, columns, block);
        if (products_.a != nullptr) {
            multiply(rows, columns, block);
        }
        if (itself_ && pair.mirrored) {
            multiply_transposed(rows, columns, b_values_, a_sums_, block);
        } else if (products_.b != nullptr) {
            multiply_transposed(rows, columns, a_values_, b_sums_, block);
        }
    }

    void multiply(PanelRange rows, PanelRange columns, const GradientBlock& block) {
        const std::int64_t height = contrast_.product_rows;
        for (std::int64_t p = 0; p < b_values_.num_panels; ++p) {
            for (std::int64_t r = rows.first; r < rows.end; r += height) {
                contrast_.multiply(tiles_.words(columns.end - columns.first),
                                   block.by_columns,
                                   r - rows.first,
                                   b_values_.panel(p, columns.first),
                                   a_sums_.row(r) + p * b_values_.width,
                                   a_sums_.stride(),
                                   static_cast<int>(std::min(height, rows.end - r)));
            }
        }
    }

    void multiply_transposed(PanelRange rows,
                             PanelRange columns,
                             const FeaturePanels& values,
                             ProductSums& sums,
                             const GradientBlock& block) {
        const std::int64_t height = contrast_.product_rows;
        for (std::int64_t p = 0; p < values.num_panels; ++p) {
            for (std::int64_t c = columns.first; c < columns.end; c += height) {
                contrast_.multiply_transposed(tiles_.words(rows.end - rows.first),
                                              block.by_rows,
                                              c - columns.first,
                                              values.panel(p, rows.first),
                                              sums.row(c) + p * values.width,
                                              sums.stride(),
                                              static_cast<int>(std::min(height, columns.end - c)));
            }
        }
    }

    void fill_block(PanelRange rows, PanelRange columns, GradientBlock& block) {
        alignas(64) float computed[kMaxTileQueries * kMaxTileRows];
        const std::int64_t num_b_panels = (num_columns_ + tiles_.rows - 1) / tiles_.rows;
        for (std::int64_t row = rows.first; row < rows.end; row += tiles_.queries) {
            const std::int64_t i = row / tiles_.queries, from = row - rows.first;
            float* values =
                block.values.data() + (contrast_.round == nullptr ? from * kGradientStride : 0);
            typename Epilogue::Strip strip(epilogue_, row);
            for (std::int64_t column = columns.first; column < columns.end; column += tiles_.rows) {
                const std::int64_t j = column / tiles_.rows;
                const float* products = computed;
                if (is_kept(row, column)) {
                    products =
                        kept_.products + (i * num_b_panels + j) * tiles_.queries * tiles_.rows;
                } else {
                    multiply_tile(engine_, a_.words, a_.panel(i), b_.panel(j), factor_, computed);
                }
                strip.add(
                    products,
                    column,
                    static_cast<int>(std::min<std::int64_t>(tiles_.rows, num_columns_ - column)),
                    values + (column - columns.first));
            }
            strip.end();
            if (contrast_.round != nullptr) {
                const std::int64_t num_columns = columns.end - columns.first;
                clear_missing(rows.end - row, num_columns, values);
                contrast_.round(
                    values, from, num_columns, block.column_pairs.data(), block.row_pairs.data());
            }
        }
    }

    // A pair can hold a row or a column that is not there: zeros of the values would make NaN of
    // its gradient where that is infinite.
    void clear_missing(std::int64_t num_rows, std::int64_t num_columns, float* values) const {
        const std::int64_t width = (num_columns + tiles_.rows - 1) / tiles_.rows * tiles_.rows;
        for (std::int64_t r = 0; r < tiles_.queries; ++r) {
            float* row = values + r * kGradientStride;
            std::fill(row + (r < num_rows ? num_columns : 0), row + width, 0.0F);
        }
    }

    // Of a batch with itself the sums have taken no tile below the diagonal, but for those near it.
    bool is_kept(std::int64_t row, std::int64_t column) const {
        const std::int64_t unit = tiles_.own_unit();
        return row / tiles_.queries < kept_.num_panels && (!itself_ || row / unit <= column / unit);
    }

    const ContrastEngine& engine_;
    const ContrastKernels& contrast_;
    const TileKernels& tiles_;
    Execution& execution_;
    const PairProducts& products_;
    Epilogue& epilogue_;
    bool itself_;
    std::int64_t num_rows_, num_columns_;
    float factor_;
    KeptTiles kept_;
    Panels a_, b_;
    FeaturePanels a_values_, b_values_;
    ProductSums a_sums_, b_sums_;
};

}  // namespace pyfeat
