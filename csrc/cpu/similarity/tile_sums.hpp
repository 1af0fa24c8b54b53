// SPDX-License-Identifier: Apache-2.0
// Sums of exponentials over the rows and columns of A B^T from tiles.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/pair_terms.hpp"
#include "cpu/similarity/products.hpp"
#include "cpu/similarity/shifted_sums.hpp"
#include "params.hpp"

namespace pyfeat {

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
        std::transform(columns.begin(), columns.end(), params.column_lse, log);  // none if itself
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

// Values of the rows or the columns of one range, for every part of a sweep; none if not wanted.
template <typename T>
class PartValues {
  public:
    PartValues(bool wanted, T initial, std::int64_t num_parts, std::int64_t count)
        : num_parts_(num_parts),
          count_(count),
          values_(wanted ? to_size(num_parts * count) : 0, initial) {}

    T* part(std::int64_t index) {
        return values_.empty() ? nullptr : &values_[to_size(index * count_)];
    }
    // take(i, value) for the first `count` of every part in turn.
    template <typename Take>
    void merge(std::int64_t count, Take take) const {
        for (std::int64_t p = 0; p < num_parts_ && !values_.empty(); ++p) {
            for (std::int64_t i = 0; i < count; ++i) {
                take(i, values_[to_size(p * count_ + i)]);
            }
        }
    }

  private:
    std::int64_t num_parts_, count_;
    std::vector<T> values_;  // [parts, count]
};

// Epilogue of ProductTiles. A row's float32 sums have got at most 4 * kStripPanels = 64 terms each
// when they are added to a float64 one.
class RowAndColumnSums {
  public:
    RowAndColumnSums(const ContrastEngine& engine,
                     ShiftedSum<Base2>* rows,
                     float* column_exponents,
                     double* column_sums,
                     const TileTerms& terms,
                     const ProductStatistics& statistics)
        : powers_(engine.kernels.powers),
          add_powers_(engine.contrast.add_powers),
          adjust_(engine.contrast.adjust),
          terms_(terms),
          statistics_(statistics),
          height_(engine.tiles.queries),
          width_(engine.tiles.rows),
          rows_(rows),
          column_exponents_(column_exponents),
          column_sums_(column_sums) {
        clear();
    }

    void add_tile(float* products, std::int64_t a_panel, std::int64_t b_panel) {
        const std::int64_t row = a_panel * height_, column = b_panel * width_;
        const PairTile pairs = terms_.tile(row, column);
        if (!pairs.empty() || statistics_.row_largest != nullptr) {
            const auto from = [](auto* values, std::int64_t first) {
                return values == nullptr ? nullptr : values + first;
            };
            adjust_(products,
                    pairs,
                    {from(statistics_.row_positives, row),
                     from(statistics_.column_positives, column),
                     from(statistics_.row_largest, row),
                     from(statistics_.column_largest, column)});
        }
        add_powers_(products,
                    {exponents_, sums_, column_exponents_ + column, column_sums_ + column});
    }

    void end_strip(std::int64_t a_panel) {
        float exponents[kMaxTileQueries];
        double sums[kMaxTileQueries];
        powers_.add_lanes(exponents_, sums_, height_, exponents, sums);
        for (int r = 0; r < height_; ++r) {
            if (exponents[r] != kNoProduct) {
                rows_[a_panel * height_ + r].add(static_cast<double>(exponents[r]), sums[r]);
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
    decltype(ContrastKernels::add_powers) add_powers_;
    decltype(ContrastKernels::adjust) adjust_;
    TileTerms terms_;               // from the first row and column on
    ProductStatistics statistics_;  // of these too
    int height_, width_;
    ShiftedSum<Base2>* rows_;  // [rows of A]
    float* column_exponents_;
    double* column_sums_;
    alignas(64) float exponents_[kMaxTileQueries * kMaxLanes];  // [MR, lanes]
    alignas(64) float sums_[kMaxTileQueries * kMaxLanes];
};

// Of S = scale A B^T in powers of two.
class TileSums {
  public:
    TileSums(const LogSumExpParams& params,
             const ProductFactors& factors,
             const ContrastEngine& engine,
             Execution& execution)
        : params_(params),
          engine_(engine),
          tiles_(engine.tiles),
          execution_(execution),
          factors_(factors),
          terms_(params.pairs, params.a.num_rows, params.b.num_rows, engine.tiles),
          totals_(params.a.num_rows, params.itself ? 0 : params.b.num_rows),
          largest_(params.row_largest == nullptr ? 0 : to_size(params.a.num_rows), kNoProduct) {}

    void run() {
        const Rows &a = params_.a, &b = params_.b;
        const std::int64_t row_bytes = 4 * tiles_.words(a.dim) + 16;
        const std::int64_t column_limit = std::min(kChunkBytes / row_bytes, kColumnsPerChunk);
        const std::int64_t unit = params_.itself ? tiles_.own_unit() : tiles_.rows;
        const std::int64_t chunk = even_chunk(b.num_rows, column_limit, unit);
        const std::int64_t range =
            params_.itself ? chunk
                           : even_chunk(a.num_rows, kRangeBytes / row_bytes, tiles_.queries);
        for (std::int64_t i = 0; i < a.num_rows; i += range) {
            const std::int64_t num_rows = std::min(range, a.num_rows - i);
            pack_factor(a, i, num_rows, factors_.a, Factor::kA, engine_, execution_, a_);
            for (std::int64_t j = params_.itself ? i : 0; j < b.num_rows; j += chunk) {
                const std::int64_t num_columns = std::min(chunk, b.num_rows - j);
                pack_factor(b, j, num_columns, factors_.b, Factor::kB, engine_, execution_, b_);
                if (params_.itself && i == j) {
                    add_own_products(i);
                } else {
                    add_products(i, j);
                }
            }
        }
    }

    void write() const {
        totals_.write(params_);
        for (std::size_t i = 0; i < largest_.size(); ++i) {
            params_.row_largest[i] = largest_[i] == kNoProduct
                                         ? -std::numeric_limits<double>::infinity()
                                         : static_cast<double>(largest_[i]) * Base2::kLog;
        }
    }

  private:
    // Of the rows of A and B that are packed.
    void add_products(std::int64_t first_row, std::int64_t first_column) {
        const Parts parts(a_.num_panels, b_.num_panels);
        Sweep sweep(*this, first_row, first_column, parts.num_b, parts.num_a);
        parts.run(execution_, [&](std::int64_t i, std::int64_t j, PanelRange a, PanelRange b) {
            sweep.add(i, j, a, b, true);
        });
        sweep.merge([](std::int64_t, std::int64_t) { return true; });
    }

    // Of rows with themselves: part i with the parts from i on, whose columns stand for rows.
    void add_own_products(std::int64_t first_row) {
        constexpr std::int64_t kOwnParts = 16;
        const std::int64_t unit = tiles_.own_unit(), units = (a_.num_rows + unit - 1) / unit;
        const std::int64_t num_parts = std::min(units, kOwnParts);
        const auto panels = [&](std::int64_t part, const Panels& packed) {
            const auto at = [&](std::int64_t index) {
                return std::min(packed.num_panels, units * index / num_parts * unit / packed.width);
            };
            return PanelRange{at(part), at(part + 1)};
        };
        Sweep sweep(*this, first_row, first_row, num_parts, num_parts);
        execution_.parallel_for(num_parts * num_parts, [&](std::int64_t task, int) {
            const std::int64_t i = task / num_parts, j = task % num_parts;
            if (i <= j) {
                sweep.add(i, j, panels(i, a_), panels(j, b_), i < j);
            }
        });
        // A part's columns with themselves have been added as rows.
        sweep.merge([&](std::int64_t part, std::int64_t column) {
            return column / b_.width < panels(part, b_).first ||
                   column / b_.width >= panels(part, b_).end;
        });
    }

    // Sums of the packed rows for every part, until they are merged in order.
    class Sweep {
      public:
        Sweep(TileSums& whole,
              std::int64_t first_row,
              std::int64_t first_column,
              std::int64_t num_row_sums,
              std::int64_t num_column_sums)
            : whole_(whole),
              first_row_(first_row),
              first_column_(first_column),
              num_row_sums_(num_row_sums),
              num_column_sums_(num_column_sums),
              height_(whole.a_.num_panels * whole.a_.width),
              width_(whole.b_.num_panels * whole.b_.width),
              rows_(to_size(num_row_sums * height_)),
              columns_(num_column_sums, width_),
              row_positives_(whole.params_.row_positives != nullptr, 0.0, num_row_sums, height_),
              column_positives_(whole.column_positives() != nullptr, 0.0, num_column_sums, width_),
              row_largest_(whole.params_.row_largest != nullptr, kNoProduct, num_row_sums, height_),
              column_largest_(whole.params_.row_largest != nullptr && whole.params_.itself,
                              kNoProduct,
                              num_column_sums,
                              width_),
              products_(
                  whole.engine_, whole.a_, whole.b_, whole.factors_.products, whole.execution_) {
            products_.keep(whole.params_.kept,
                           first_row / whole.tiles_.queries,
                           first_column / whole.tiles_.rows,
                           (whole.params_.b.num_rows + whole.tiles_.rows - 1) / whole.tiles_.rows);
        }

        void add(std::int64_t i, std::int64_t j, PanelRange a, PanelRange b, bool with_columns) {
            RowAndColumnSums sums(whole_.engine_,
                                  &rows_[to_size(j * height_)],
                                  columns_.exponents(i),
                                  columns_.sums(i),
                                  {whole_.terms_, first_row_, first_column_},
                                  {row_positives_.part(j),
                                   with_columns ? column_positives_.part(i) : nullptr,
                                   row_largest_.part(j),
                                   with_columns ? column_largest_.part(i) : nullptr});
            products_.run(a, b, sums);
        }

        // counts(part, column) says which column sums do.
        template <typename Counts>
        void merge(Counts counts) {
            const std::int64_t num_rows = whole_.a_.num_rows, num_columns = whole_.b_.num_rows;
            const LogSumExpParams& params = whole_.params_;
            auto& column_totals = params.itself ? whole_.totals_.rows : whole_.totals_.columns;
            const auto add_to = [](double* totals, std::int64_t first) {
                return [=](std::int64_t i, double sum) { totals[first + i] += sum * Base2::kLog; };
            };
            const auto raise = [this](std::int64_t first) {
                return [this, first](std::int64_t i, float value) {
                    float& largest = whole_.largest_[to_size(first + i)];
                    largest = std::max(largest, value);
                };
            };
            row_positives_.merge(num_rows, add_to(params.row_positives, first_row_));
            column_positives_.merge(num_columns, add_to(whole_.column_positives(), first_column_));
            row_largest_.merge(num_rows, raise(first_row_));
            column_largest_.merge(num_columns, raise(first_column_));
            pyfeat::merge(num_row_sums_,
                          num_rows,
                          &whole_.totals_.rows[to_size(first_row_)],
                          whole_.execution_,
                          [&](std::int64_t part, std::int64_t row) {
                              return rows_[to_size(part * height_ + row)];
                          });
            pyfeat::merge(num_column_sums_,
                          num_columns,
                          &column_totals[to_size(first_column_)],
                          whole_.execution_,
                          [&](std::int64_t part, std::int64_t column) {
                              return counts(part, column) ? columns_.at(part, column)
                                                          : ShiftedSum<Base2>{};
                          });
        }

      private:
        TileSums& whole_;
        std::int64_t first_row_, first_column_;
        std::int64_t num_row_sums_, num_column_sums_;
        std::int64_t height_, width_;
        std::vector<ShiftedSum<Base2>> rows_;
        ColumnSums columns_;
        PartValues<double> row_positives_, column_positives_;
        PartValues<float> row_largest_, column_largest_;
        ProductTiles<RowAndColumnSums> products_;
    };

    // What columns add to; of a batch with itself they are rows.
    double* column_positives() const {
        return params_.itself ? params_.row_positives : params_.column_positives;
    }

    const LogSumExpParams& params_;
    const ContrastEngine& engine_;
    const TileKernels& tiles_;
    Execution& execution_;
    ProductFactors factors_;
    PaddedTerms terms_;
    Panels a_, b_;
    Totals<Base2> totals_;
    std::vector<float> largest_;  // [L]
};

}  // namespace pyfeat
