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
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/products.hpp"
#include "cpu/similarity/schedule.hpp"
#include "cpu/similarity/shifted_sums.hpp"
#include "params.hpp"

namespace pyfeat {

// A factor in the order in which gradients are multiplied with it: panels of NR features.
struct FeaturePanels {
    std::int64_t num_rows = 0, num_panels = 0;
    int width = 0;
    AlignedFloats values;  // [num_panels, num_rows, width]

    const float* panel(std::int64_t index, std::int64_t row) const {
        return values.data() + (index * num_rows + row) * width;
    }
};

inline void pack_features(const Rows& rows,
                          const Kernels& kernels,
                          Execution& execution,
                          FeaturePanels& packed) {
    constexpr std::int64_t kPerTask = 64;
    packed.width = kernels.tile_kernels(Precision::kFloat32).rows;
    packed.num_rows = rows.num_rows;
    packed.num_panels = (rows.dim + packed.width - 1) / packed.width;
    packed.values.reserve(packed.num_panels * packed.num_rows * packed.width);
    const RowKernels& row_kernels = kernels.row_kernels(rows.dtype);
    execution.parallel_for((rows.num_rows + kPerTask - 1) / kPerTask, [&](std::int64_t task, int) {
        std::vector<double> values(to_size(packed.num_panels * packed.width), 0.0);
        const std::int64_t end = std::min(rows.num_rows, (task + 1) * kPerTask);
        for (std::int64_t row = task * kPerTask; row < end; ++row) {
            row_kernels.load(rows.row(row), 1.0, rows.dim, values.data());
            for (std::int64_t p = 0; p < packed.num_panels; ++p) {
                float* to = packed.values.data() + (p * packed.num_rows + row) * packed.width;
                for (int d = 0; d < packed.width; ++d) {
                    to[d] = static_cast<float>(values[to_size(p * packed.width + d)]);
                }
            }
        }
    });
}

// Running sums of a product, [rows, panels * NR].
class ProductSums {
  public:
    void start(std::int64_t num_rows, const FeaturePanels& values, std::int64_t padding) {
        num_rows_ = num_rows;
        stride_ = values.num_panels * values.width;
        values_.reserve((num_rows + padding) * stride_);
        std::fill_n(values_.data(), (num_rows + padding) * stride_, 0.0F);
    }

    std::int64_t stride() const {
        return stride_;
    }
    float* row(std::int64_t index) {
        return values_.data() + index * stride_;
    }
    void write(std::int64_t dim, float* product) const {
        for (std::int64_t i = 0; i < num_rows_; ++i) {
            std::copy_n(values_.data() + i * stride_, dim, product + i * dim);
        }
    }

  private:
    std::int64_t num_rows_ = 0, stride_ = 0;
    AlignedFloats values_;
};

// Products of the factors a and b, packed for tiles with the scale in a, and where they are kept.
struct PackedFactors {
    const Rows& a;
    const Rows& b;
    std::pair<double, double> factors;
    KeptTiles kept;
};

template <typename Epilogue>
class GradientProducts {
  public:
    // itself: a and b are the same rows, values too, and dS is symmetric; only products.a is made.
    GradientProducts(const PackedFactors& factors,
                     const PairProducts& products,
                     bool itself,
                     Epilogue& epilogue,
                     const Kernels& kernels,
                     Execution& execution)
        : kernels_(kernels),
          tiles_(kernels.tile_kernels(Precision::kFloat32)),
          execution_(execution),
          products_(products),
          epilogue_(epilogue),
          itself_(itself),
          num_rows_(factors.a.num_rows),
          num_columns_(factors.b.num_rows),
          kept_(factors.kept) {
        const auto& [a_factor, b_factor] = factors.factors;
        // With every tile kept there is nothing to multiply.
        if (itself || kept_.num_panels * tiles_.queries < num_rows_) {
            pack_factor(factors.a, 0, num_rows_, a_factor, Factor::kA, kernels, execution, a_);
            pack_factor(factors.b, 0, num_columns_, b_factor, Factor::kB, kernels, execution, b_);
        }
        if (products.a != nullptr) {
            pack_features(products.b_values, kernels, execution, b_values_);
            a_sums_.start(num_rows_, b_values_, tiles_.queries);
        }
        if (products.b != nullptr) {
            pack_features(products.a_values, kernels, execution, a_values_);
            b_sums_.start(num_columns_, a_values_, tiles_.queries);
        }
    }

    void run() {
        const PairSchedule schedule(num_rows_, num_columns_, tiles_, itself_);
        std::vector<AlignedFloats> blocks(to_size(execution_.num_threads()));
        for (std::int64_t round = 0; round < schedule.num_rounds(); ++round) {
            const std::vector<PartPair> pairs = schedule.round(round);
            execution_.parallel_for(static_cast<std::int64_t>(pairs.size()),
                                    [&](std::int64_t task, int worker) {
                                        AlignedFloats& block = blocks[to_size(worker)];
                                        block.reserve(kGradientRows * kGradientStride);
                                        add_part(pairs[to_size(task)], block.data());
                                    });
        }
        if (products_.a != nullptr) {
            a_sums_.write(products_.b_values.dim, products_.a);
        }
        if (products_.b != nullptr) {
            b_sums_.write(products_.a_values.dim, products_.b);
        }
    }

  private:
    void add_part(const PartPair& pair, float* block) {
        for (std::int64_t column = pair.columns.first; column < pair.columns.end;
             column += kGradientColumns) {
            for (std::int64_t row = pair.rows.first; row < pair.rows.end; row += kGradientRows) {
                if (execution_.stop_requested()) {
                    return;
                }
                add_block({row, std::min(pair.rows.end, row + kGradientRows)},
                          {column, std::min(pair.columns.end, column + kGradientColumns)},
                          pair,
                          block);
            }
        }
    }

    // The block [kGradientRows, kGradientStride] of dS is used for both products and dropped. What
    // fills up the last panels is never multiplied, and its sums are not written out.
    void add_block(PanelRange rows, PanelRange columns, const PartPair& pair, float* block) {
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

    void multiply(PanelRange rows, PanelRange columns, const float* block) {
        for (std::int64_t p = 0; p < b_values_.num_panels; ++p) {
            for (std::int64_t r = rows.first; r < rows.end; r += tiles_.queries) {
                kernels_.contrast.multiply(
                    columns.end - columns.first,
                    block + (r - rows.first) * kGradientStride,
                    b_values_.panel(p, columns.first),
                    a_sums_.row(r) + p * b_values_.width,
                    a_sums_.stride(),
                    static_cast<int>(std::min<std::int64_t>(tiles_.queries, rows.end - r)));
            }
        }
    }

    void multiply_transposed(PanelRange rows,
                             PanelRange columns,
                             const FeaturePanels& values,
                             ProductSums& sums,
                             const float* block) {
        for (std::int64_t p = 0; p < values.num_panels; ++p) {
            for (std::int64_t c = columns.first; c < columns.end; c += tiles_.queries) {
                kernels_.contrast.multiply_transposed(
                    rows.end - rows.first,
                    block + (c - columns.first),
                    values.panel(p, rows.first),
                    sums.row(c) + p * values.width,
                    sums.stride(),
                    static_cast<int>(std::min<std::int64_t>(tiles_.queries, columns.end - c)));
            }
        }
    }

    void fill_block(PanelRange rows, PanelRange columns, float* block) {
        alignas(64) float computed[kMaxTileQueries * kMaxTileRows];
        const std::int64_t num_b_panels = (num_columns_ + tiles_.rows - 1) / tiles_.rows;
        const TileUse use(tiles_);
        for (std::int64_t row = rows.first; row < rows.end; row += tiles_.queries) {
            const std::int64_t i = row / tiles_.queries;
            typename Epilogue::Strip strip(epilogue_, row);
            for (std::int64_t column = columns.first; column < columns.end; column += tiles_.rows) {
                const std::int64_t j = column / tiles_.rows;
                const float* products = computed;
                if (is_kept(row, column)) {
                    products =
                        kept_.products + (i * num_b_panels + j) * tiles_.queries * tiles_.rows;
                } else {
                    tiles_.multiply(a_.words, a_.panel(i), b_.panel(j), computed);
                }
                strip.add(
                    products,
                    column,
                    static_cast<int>(std::min<std::int64_t>(tiles_.rows, num_columns_ - column)),
                    block + (row - rows.first) * kGradientStride + (column - columns.first));
            }
            strip.end();
        }
    }

    // Of a batch with itself the sums have taken no tile below the diagonal, but for those near it.
    bool is_kept(std::int64_t row, std::int64_t column) const {
        const std::int64_t unit = tiles_.own_unit();
        return row / tiles_.queries < kept_.num_panels && (!itself_ || row / unit <= column / unit);
    }

    const Kernels& kernels_;
    const TileKernels& tiles_;
    Execution& execution_;
    const PairProducts& products_;
    Epilogue& epilogue_;
    bool itself_;
    std::int64_t num_rows_, num_columns_;
    KeptTiles kept_;
    Panels a_, b_;
    FeaturePanels a_values_, b_values_;
    ProductSums a_sums_, b_sums_;
};

}  // namespace pyfeat
