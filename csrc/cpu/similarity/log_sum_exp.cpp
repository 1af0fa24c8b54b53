// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/log_sum_exp.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/products.hpp"
#include "cpu/similarity/shifted_sums.hpp"
#include "cpu/similarity/tile_sums.hpp"

namespace pyfeat {
namespace {

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
    const ContrastEngine engine(isa, {params.a.dtype, params.b.dtype});
    PYFEAT_CHECK(params.a.dim == params.b.dim, "a and b must have the same width");
    PYFEAT_CHECK(params.pairs.empty() || params.product_dtype == Dtype::kFloat32,
                 "pairs need float32 products");
    if (params.row_positives != nullptr) {
        std::fill_n(params.row_positives, params.a.num_rows, 0.0);
    }
    if (params.column_positives != nullptr) {
        std::fill_n(params.column_positives, params.b.num_rows, 0.0);
    }
    // Wider rows than a tile takes would lose float32 sums altogether.
    const bool tiles =
        params.product_dtype == Dtype::kFloat32 && params.a.dim <= engine.tiles.largest_dim;
    PYFEAT_CHECK(tiles || (params.pairs.empty() && !params.itself && params.row_largest == nullptr),
                 "pairs need rows that fit a tile");
    const auto factors = checked_factors("log_sum_exp",
                                         params.a,
                                         params.b,
                                         params.scale,
                                         tiles ? kLargestProduct : 1e300,
                                         engine,
                                         execution);
    if (tiles) {
        TileSums sums(params, factors, engine, execution);
        sums.run();
        sums.write();
    } else {
        DotSums(params, engine.kernels, execution).run().write(params);
    }
}

}  // namespace pyfeat
