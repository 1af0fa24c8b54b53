// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/contrast.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "check.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/pair_terms.hpp"
#include "cpu/similarity/products.hpp"
#include "cpu/similarity/shifted_sums.hpp"

namespace pyfeat {
namespace {

// Rows and columns are cut into as many parts, of at least kLeastPart. In round t a task has part p
// of the rows and part p + t of the columns to itself, so that the sums of both are added up in one
// order whatever the number of threads.
constexpr std::int64_t kMostParts = 32, kLeastPart = 64;

// The terms of rows or of columns in float32, filled up for the last panel.
class PaddedGradientTerms {
  public:
    // Null lse: they have no part.
    PaddedGradientTerms(const double* lse,
                        const double* weights,
                        const double* positives,
                        std::int64_t count,
                        double scale) {
        if (lse == nullptr) {
            return;
        }
        const std::int64_t padded = count + kMaxTileQueries + kMaxTileRows;
        for (AlignedFloats* values : {&shifts_, &weights_, &positives_}) {
            values->reserve(padded);
            std::fill_n(values->data(), padded, 0.0F);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            // weight * exp(S - lse) = weight' * 2^(S / ln 2 - shift) with a whole shift.
            const double exponent = lse[i] / Base2::kLog;
            const double shift = std::isfinite(exponent) ? std::rint(exponent) : 0.0;
            const double factor = std::isfinite(exponent) ? std::exp2(shift - exponent) : 0.0;
            shifts_.data()[i] = static_cast<float>(shift);
            weights_.data()[i] = static_cast<float>(scale * weights[i] * factor);
            positives_.data()[i] = static_cast<float>(scale * positives[i]);
        }
    }

    GradientTerms from(std::int64_t first) const {
        if (shifts_.data() == nullptr) {
            return {nullptr, nullptr, nullptr};
        }
        return {shifts_.data() + first, weights_.data() + first, positives_.data() + first};
    }

  private:
    AlignedFloats shifts_, weights_, positives_;
};

// A factor in the order in which gradients are multiplied with it: panels of NR features.
struct FeaturePanels {
    std::int64_t num_rows = 0, num_panels = 0;
    int width = 0;
    AlignedFloats values;  // [num_panels, num_rows, width]

    const float* panel(std::int64_t index, std::int64_t row) const {
        return values.data() + (index * num_rows + row) * width;
    }
};

FeaturePanels pack_features(const Rows& rows, const Kernels& kernels, Execution& execution) {
    constexpr std::int64_t kPerTask = 64;
    FeaturePanels packed;
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
    return packed;
}

// Running sums of a gradient, [rows, panels * NR].
class GradientSums {
  public:
    GradientSums(const FeaturePanels& features, std::int64_t padding)
        : num_rows_(features.num_rows), stride_(features.num_panels * features.width) {
        values_.reserve((num_rows_ + padding) * stride_);
        std::fill_n(values_.data(), (num_rows_ + padding) * stride_, 0.0F);
    }

    std::int64_t stride() const {
        return stride_;
    }
    float* row(std::int64_t index) {
        return values_.data() + index * stride_;
    }
    void write(std::int64_t dim, float* gradient) const {
        for (std::int64_t i = 0; i < num_rows_; ++i) {
            std::copy_n(values_.data() + i * stride_, dim, gradient + i * dim);
        }
    }

  private:
    std::int64_t num_rows_, stride_;
    AlignedFloats values_;
};

class ContrastGradient {
  public:
    ContrastGradient(const ContrastGradientParams& params,
                     const Kernels& kernels,
                     Execution& execution)
        : params_(params),
          kernels_(kernels),
          tiles_(kernels.tile_kernels(Precision::kFloat32)),
          execution_(execution),
          terms_(params.pairs, params.a.num_rows, params.b.num_rows),
          rows_(params.row_lse,
                params.row_weights,
                params.row_positives,
                params.a.num_rows,
                params.scale),
          columns_(params.column_lse,
                   params.column_weights,
                   params.column_positives,
                   params.b.num_rows,
                   params.scale),
          a_features_(pack_features(params.a, kernels, execution)),
          b_features_(pack_features(params.b, kernels, execution)),
          grad_a_(a_features_, tiles_.queries),
          grad_b_(b_features_, tiles_.queries) {}

    void run(double a_factor, double b_factor) {
        const Rows &a = params_.a, &b = params_.b;
        pack_factor(a, 0, a.num_rows, a_factor, Factor::kA, kernels_, execution_, a_);
        pack_factor(b, 0, b.num_rows, b_factor, Factor::kB, kernels_, execution_, b_);
        const std::int64_t num_parts =
            std::clamp<std::int64_t>(std::min(a.num_rows, b.num_rows) / kLeastPart, 1, kMostParts);
        const auto part_of = [&](std::int64_t panels, std::int64_t part) {
            return PanelRange{panels * part / num_parts, panels * (part + 1) / num_parts};
        };
        std::vector<AlignedFloats> blocks(to_size(execution_.num_threads()));
        for (std::int64_t round = 0; round < num_parts; ++round) {
            execution_.parallel_for(num_parts, [&](std::int64_t part, int worker) {
                AlignedFloats& block = blocks[to_size(worker)];
                block.reserve(kGradientRows * kGradientStride);
                add_part(part_of(a_.num_panels, part),
                         part_of(b_.num_panels, (part + round) % num_parts),
                         block.data());
            });
        }
        grad_a_.write(a.dim, params_.grad_a);
        grad_b_.write(b.dim, params_.grad_b);
    }

  private:
    void add_part(PanelRange a, PanelRange b, float* block) {
        const std::int64_t height = kGradientRows / tiles_.queries;
        const std::int64_t width = kGradientColumns / tiles_.rows;
        for (std::int64_t j = b.first; j < b.end; j += width) {
            for (std::int64_t i = a.first; i < a.end; i += height) {
                if (execution_.stop_requested()) {
                    return;
                }
                add_block({i, std::min(a.end, i + height)}, {j, std::min(b.end, j + width)}, block);
            }
        }
    }

    // The block [kGradientRows, kGradientStride] of dS is used for both gradients and dropped.
    void add_block(PanelRange a, PanelRange b, float* block) {
        fill_block(a, b, block);
        const std::int64_t row = a.first * tiles_.queries, column = b.first * tiles_.rows;
        const std::int64_t num_rows = std::min(a.end * tiles_.queries, params_.a.num_rows) - row;
        const std::int64_t num_columns = std::min(b.end * tiles_.rows, params_.b.num_rows) - column;
        // What fills up the last panels is never multiplied, and its sums are not written out.
        for (std::int64_t p = 0; p < b_features_.num_panels; ++p) {
            for (std::int64_t r = 0; r < num_rows; r += tiles_.queries) {
                kernels_.contrast.multiply(num_columns,
                                           block + r * kGradientStride,
                                           b_features_.panel(p, column),
                                           grad_a_.row(row + r) + p * b_features_.width,
                                           grad_a_.stride(),
                                           tiles_.queries);
            }
        }
        for (std::int64_t p = 0; p < a_features_.num_panels; ++p) {
            for (std::int64_t c = 0; c < num_columns; c += tiles_.queries) {
                kernels_.contrast.multiply_transposed(
                    num_rows,
                    block + c,
                    a_features_.panel(p, row),
                    grad_b_.row(column + c) + p * a_features_.width,
                    grad_b_.stride(),
                    static_cast<int>(std::min<std::int64_t>(tiles_.queries, num_columns - c)));
            }
        }
    }

    void fill_block(PanelRange a, PanelRange b, float* block) const {
        alignas(64) float products[kMaxTileQueries * kMaxTileRows];
        const TileUse use(tiles_);
        for (std::int64_t i = a.first; i < a.end; ++i) {
            for (std::int64_t j = b.first; j < b.end; ++j) {
                const std::int64_t row = i * tiles_.queries, column = j * tiles_.rows;
                float* gradient = block + (i - a.first) * tiles_.queries * kGradientStride +
                                  (j - b.first) * tiles_.rows;
                tiles_.multiply(a_.words, a_.panel(i), b_.panel(j), products);
                kernels_.contrast.gradient(products,
                                           terms_.from(row, column).terms,
                                           rows_.from(row),
                                           columns_.from(column),
                                           gradient);
            }
        }
    }

    const ContrastGradientParams& params_;
    const Kernels& kernels_;
    const TileKernels& tiles_;
    Execution& execution_;
    PaddedTerms terms_;
    PaddedGradientTerms rows_, columns_;
    Panels a_, b_;
    FeaturePanels a_features_, b_features_;
    GradientSums grad_a_, grad_b_;
};

}  // namespace

void contrast_gradient_cpu(const ContrastGradientParams& params, Isa isa, Execution& execution) {
    const Kernels& kernels = kernels_for(isa);
    PYFEAT_CHECK(params.a.dim == params.b.dim, "a and b must have the same width");
    PYFEAT_CHECK(params.a.dim <= kernels.tile_kernels(Precision::kFloat32).largest_dim,
                 "rows must fit a tile");
    const double a_norm = largest_norm(params.a, "contrast", "a", kernels, execution);
    const double b_norm = largest_norm(params.b, "contrast", "b", kernels, execution);
    PYFEAT_CHECK(a_norm * b_norm * std::abs(params.scale) <= 1e36,
                 "contrast: scale |a| |b| must be at most 1e36 for the longest rows");
    const auto [a_factor, b_factor] = product_factors(params.scale, a_norm, b_norm);
    ContrastGradient(params, kernels, execution).run(a_factor, b_factor);
}

}  // namespace pyfeat
