// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/log_sum_exp.hpp"

#include <algorithm>
#include <cmath>
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

constexpr std::int64_t kRangeBytes = 64LL << 20;  // of packed rows of A and their sums
constexpr std::int64_t kChunkBytes = 16LL << 20;  // of packed rows of B
constexpr std::int64_t kColumnsPerChunk = (32LL << 20) / (16 * kParts);  // 16 bytes for each sum

template <typename Base>
struct Totals {
    std::vector<ShiftedSum<Base>> rows, columns;  // [L], [S]

    Totals(std::int64_t num_rows, std::int64_t num_columns)
        : rows(to_size(num_rows)), columns(to_size(num_columns)) {}

    void write(const LogSumExpParams& params) const {
        const auto log = [](const ShiftedSum<Base>& sum) { return sum.log(); };
        std::transform(rows.begin(), rows.end(), params.row_lse, log);
        std::transform(columns.begin(), columns.end(), params.column_lse, log);
    }
};

// Column sums of one chunk of B, for every part of A.
class ColumnSums {
  public:
    ColumnSums(std::int64_t num_parts, std::int64_t num_columns)
        : num_columns_(num_columns), sums_(to_size(num_parts * num_columns), 0.0) {
        exponents_.reserve(num_parts * num_columns);
        std::fill_n(exponents_.data(), num_parts * num_columns, kNoProduct);
    }

    float* exponents(std::int64_t part) {
        return exponents_.data() + part * num_columns_;
    }
    double* sums(std::int64_t part) {
        return sums_.data() + part * num_columns_;
    }
    ShiftedSum<Base2> at(std::int64_t part, std::int64_t column) const {
        const float exponent = exponents_.data()[part * num_columns_ + column];
        // Terms that do not count have been added up under this exponent.
        return exponent == kNoProduct
                   ? ShiftedSum<Base2>{}
                   : ShiftedSum<Base2>{exponent, sums_[to_size(part * num_columns_ + column)]};
    }

  private:
    std::int64_t num_columns_;
    AlignedFloats exponents_;   // [parts, columns]
    std::vector<double> sums_;  // [parts, columns]
};

// Sums of positive products of the rows or the columns of one range, for every part.
class PositiveParts {
  public:
    PositiveParts(bool wanted, std::int64_t num_parts, std::int64_t count)
        : num_parts_(num_parts),
          count_(count),
          sums_(wanted ? to_size(num_parts * count) : 0, 0.0) {}

    // Null if they are not wanted.
    double* part(std::int64_t index) {
        return sums_.empty() ? nullptr : &sums_[to_size(index * count_)];
    }
    // Adds the first `count` of every part to `totals` from `first` on, in natural units.
    void add_to(double* totals, std::int64_t first, std::int64_t count) const {
        for (std::int64_t p = 0; p < num_parts_ && !sums_.empty(); ++p) {
            for (std::int64_t i = 0; i < count; ++i) {
                totals[first + i] += sums_[to_size(p * count_ + i)] * Base2::kLog;
            }
        }
    }

  private:
    std::int64_t num_parts_, count_;
    std::vector<double> sums_;  // [parts, count]
};

// Epilogue of ProductTiles. A row's float32 sums have got at most 4 * kStripPanels = 64 terms each
// when they are added to a float64 one.
class RowAndColumnSums {
  public:
    RowAndColumnSums(const Kernels& kernels,
                     ShiftedSum<Base2>* rows,
                     float* column_exponents,
                     double* column_sums,
                     const TileTerms& terms,
                     const PositiveSums& positives)
        : powers_(kernels.powers),
          adjust_(terms.empty() ? nullptr : kernels.contrast.adjust),
          terms_(terms),
          positives_(positives),
          height_(kernels.tile_kernels(Precision::kFloat32).queries),
          width_(kernels.tile_kernels(Precision::kFloat32).rows),
          rows_(rows),
          column_exponents_(column_exponents),
          column_sums_(column_sums) {
        clear();
    }

    void add_tile(float* products, std::int64_t a_panel, std::int64_t b_panel) {
        if (adjust_ != nullptr) {
            const std::int64_t row = a_panel * height_, column = b_panel * width_;
            const PositiveSums sums{
                positives_.rows == nullptr ? nullptr : positives_.rows + row,
                positives_.columns == nullptr ? nullptr : positives_.columns + column};
            adjust_(products, terms_.tile(row, column), sums);
        }
        powers_.add_tile(products,
                         {exponents_,
                          sums_,
                          column_exponents_ + b_panel * width_,
                          column_sums_ + b_panel * width_});
    }

    void end_strip(std::int64_t a_panel) {
        for (int i = 0; i < height_ * powers_.lanes; ++i) {
            if (exponents_[i] != kNoProduct) {
                rows_[a_panel * height_ + i / powers_.lanes].add(exponents_[i], sums_[i]);
            }
        }
        clear();
    }

  private:
    void clear() {
        std::fill_n(exponents_, height_ * powers_.lanes, kNoProduct);
        std::fill_n(sums_, height_ * powers_.lanes, 0.0F);
    }

    const PowerKernels& powers_;
    decltype(ContrastKernels::adjust) adjust_;
    TileTerms terms_;         // from the first row and column on
    PositiveSums positives_;  // of these too
    int height_, width_;
    ShiftedSum<Base2>* rows_;  // [rows of A]
    float* column_exponents_;
    double* column_sums_;
    alignas(64) float exponents_[kMaxTileQueries * kMaxLanes];  // [MR, lanes]
    alignas(64) float sums_[kMaxTileQueries * kMaxLanes];
};

// float32 products by tiles, in powers of two: A takes scale / ln 2 in.
class TileSums {
  public:
    TileSums(const LogSumExpParams& params,
             double a_norm,
             double b_norm,
             const Kernels& kernels,
             Execution& execution)
        : params_(params),
          kernels_(kernels),
          execution_(execution),
          terms_(params.pairs, params.a.num_rows, params.b.num_rows),
          totals_(params.a.num_rows, params.b.num_rows) {
        std::tie(a_factor_, b_factor_) = product_factors(params.scale, a_norm, b_norm);
    }

    const Totals<Base2>& run() {
        const Rows &a = params_.a, &b = params_.b;
        const TileKernels& tiles = kernels_.tile_kernels(Precision::kFloat32);
        const std::int64_t row_bytes = 4 * tiles.words(a.dim) + 16;
        const std::int64_t range = even_chunk(a.num_rows, kRangeBytes / row_bytes, tiles.queries);
        const std::int64_t chunk =
            even_chunk(b.num_rows, std::min(kChunkBytes / row_bytes, kColumnsPerChunk), tiles.rows);
        for (std::int64_t i = 0; i < a.num_rows; i += range) {
            const std::int64_t num_rows = std::min(range, a.num_rows - i);
            pack_factor(a, i, num_rows, a_factor_, Factor::kA, kernels_, execution_, a_);
            for (std::int64_t j = 0; j < b.num_rows; j += chunk) {
                const std::int64_t num_columns = std::min(chunk, b.num_rows - j);
                pack_factor(b, j, num_columns, b_factor_, Factor::kB, kernels_, execution_, b_);
                add_products(i, j);
            }
        }
        return totals_;
    }

  private:
    // Of the rows of A and B that are packed.
    void add_products(std::int64_t first_row, std::int64_t first_column) {
        const Parts parts(a_.num_panels, b_.num_panels);
        const std::int64_t height = a_.num_panels * a_.width;
        std::vector<ShiftedSum<Base2>> rows(to_size(parts.num_b * height));
        const std::int64_t width = b_.num_panels * b_.width;
        ColumnSums columns(parts.num_a, width);
        PositiveParts row_positives(params_.row_positives != nullptr, parts.num_b, height);
        PositiveParts column_positives(params_.column_positives != nullptr, parts.num_a, width);
        const ProductTiles<RowAndColumnSums> products(
            kernels_.tile_kernels(Precision::kFloat32), a_, b_, execution_);
        parts.run(execution_, [&](std::int64_t i, std::int64_t j, PanelRange a, PanelRange b) {
            RowAndColumnSums sums(kernels_,
                                  &rows[to_size(j * height)],
                                  columns.exponents(i),
                                  columns.sums(i),
                                  terms_.from(first_row, first_column),
                                  {row_positives.part(j), column_positives.part(i)});
            products.run(a, b, sums);
        });
        row_positives.add_to(params_.row_positives, first_row, a_.num_rows);
        column_positives.add_to(params_.column_positives, first_column, b_.num_rows);
        merge(parts.num_b,
              a_.num_rows,
              &totals_.rows[to_size(first_row)],
              execution_,
              [&](std::int64_t part, std::int64_t row) {
                  return rows[to_size(part * height + row)];
              });
        merge(parts.num_a,
              b_.num_rows,
              &totals_.columns[to_size(first_column)],
              execution_,
              [&](std::int64_t part, std::int64_t column) { return columns.at(part, column); });
    }

    const LogSumExpParams& params_;
    const Kernels& kernels_;
    Execution& execution_;
    PaddedTerms terms_;
    double a_factor_, b_factor_;
    Panels a_, b_;
    Totals<Base2> totals_;
};

// float64 products, one dot after the other.
class DotSums {
  public:
    DotSums(const LogSumExpParams& params, const Kernels& kernels, Execution& execution)
        : params_(params),
          a_kernels_(kernels.row_kernels(params.a.dtype)),
          b_kernels_(kernels.row_kernels(params.b.dtype)),
          execution_(execution),
          totals_(params.a.num_rows, params.b.num_rows) {}

    const Totals<BaseE>& run() {
        const std::int64_t range = even_chunk(params_.a.num_rows, kRangeBytes / (16 * kParts), 1);
        const std::int64_t chunk = even_chunk(params_.b.num_rows, kColumnsPerChunk, 1);
        for (std::int64_t i = 0; i < params_.a.num_rows; i += range) {
            for (std::int64_t j = 0; j < params_.b.num_rows; j += chunk) {
                add_products(i,
                             std::min(range, params_.a.num_rows - i),
                             j,
                             std::min(chunk, params_.b.num_rows - j));
            }
        }
        return totals_;
    }

  private:
    void add_products(std::int64_t first_row,
                      std::int64_t num_rows,
                      std::int64_t first_column,
                      std::int64_t num_columns) {
        const Parts parts(num_rows, num_columns);
        std::vector<ShiftedSum<BaseE>> rows(to_size(parts.num_b * num_rows));
        std::vector<ShiftedSum<BaseE>> columns(to_size(parts.num_a * num_columns));
        parts.run(execution_, [&](std::int64_t i, std::int64_t j, PanelRange a, PanelRange b) {
            add_part({first_row + a.first, first_row + a.end},
                     {first_column + b.first, first_column + b.end},
                     &rows[to_size(j * num_rows + a.first)],
                     &columns[to_size(i * num_columns + b.first)]);
        });
        const auto at = [](const auto& sums, std::int64_t count) {
            return [&sums, count](std::int64_t part, std::int64_t i) {
                return sums[to_size(part * count + i)];
            };
        };
        merge(parts.num_b,
              num_rows,
              &totals_.rows[to_size(first_row)],
              execution_,
              at(rows, num_rows));
        merge(parts.num_a,
              num_columns,
              &totals_.columns[to_size(first_column)],
              execution_,
              at(columns, num_columns));
    }

    void add_part(PanelRange a, PanelRange b, ShiftedSum<BaseE>* rows, ShiftedSum<BaseE>* columns) {
        constexpr std::int64_t kColumnsPerPoll = 256;
        const std::int64_t dim = params_.a.dim;
        std::vector<double> row(to_size(dim));
        for (std::int64_t first = b.first; first < b.end; first += kColumnsPerPoll) {
            const std::int64_t end = std::min(b.end, first + kColumnsPerPoll);
            for (std::int64_t i = a.first; i < a.end; ++i) {
                if (execution_.stop_requested()) {
                    return;
                }
                a_kernels_.load(params_.a.row(i), 1.0, dim, row.data());
                for (std::int64_t j = first; j < end; ++j) {
                    const double product =
                        params_.scale * b_kernels_.dot(row.data(), params_.b.row(j), dim);
                    rows[i - a.first].add(product, 1.0);
                    columns[j - b.first].add(product, 1.0);
                }
            }
        }
    }

    const LogSumExpParams& params_;
    const RowKernels& a_kernels_;
    const RowKernels& b_kernels_;
    Execution& execution_;
    Totals<BaseE> totals_;
};

}  // namespace

void log_sum_exp_cpu(const LogSumExpParams& params, Isa isa, Execution& execution) {
    const Kernels& kernels = kernels_for(isa);
    PYFEAT_CHECK(params.a.dim == params.b.dim, "a and b must have the same width");
    PYFEAT_CHECK(params.pairs.empty() || params.product_dtype == Dtype::kFloat32,
                 "pairs need float32 products");
    if (params.row_positives != nullptr) {
        std::fill_n(params.row_positives, params.a.num_rows, 0.0);
    }
    if (params.column_positives != nullptr) {
        std::fill_n(params.column_positives, params.b.num_rows, 0.0);
    }
    PYFEAT_CHECK(std::abs(params.scale) <= 1e36,
                 "log_sum_exp: scale must be at most 1e36 in magnitude, got ",
                 params.scale);
    const double a_norm = largest_norm(params.a, "log_sum_exp", "a", kernels, execution);
    const double b_norm = largest_norm(params.b, "log_sum_exp", "b", kernels, execution);
    // Wider rows than a tile takes would lose float32 sums altogether.
    const bool tiles = params.product_dtype == Dtype::kFloat32 &&
                       params.a.dim <= kernels.tile_kernels(Precision::kFloat32).largest_dim;
    PYFEAT_CHECK(params.pairs.empty() || tiles, "pairs need rows that fit a tile");
    const double largest = a_norm * b_norm * std::abs(params.scale), limit = tiles ? 1e36 : 1e300;
    PYFEAT_CHECK(largest <= limit,
                 "log_sum_exp: scale |a| |b| must be at most ",
                 limit,
                 " for the longest rows, got ",
                 largest);
    if (tiles) {
        TileSums(params, a_norm, b_norm, kernels, execution).run().write(params);
    } else {
        DotSums(params, kernels, execution).run().write(params);
    }
}

}  // namespace pyfeat
