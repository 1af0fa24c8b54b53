// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/pack.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "check.hpp"

namespace pyfeat {
namespace {

constexpr std::int64_t kSampledRows = 4096;
constexpr std::int64_t kRowsPerTask = 1024;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Error of one packed score. Everything is in the frame's units; u = 2^-24, x and q are the exact
// transformed row and query, x^ and q^ what is packed.
//
//   packing      ||x - x^|| is measured in float64, and ||q - q^|| too; the product may treat
//                subnormal values as zero, at most sqrt(D) tiny more, tiny = 2^-126.
//   product      D multiply-adds in float32, fused or not, in any one order (products of bfloat16
//                are exact):
//                |p - q^.x^| <= g ||q^|| ||x^|| + D tiny,  g = D u / (1 - D u).
//   row term     h (half the squared norm, or -mean.x) rounded once: u |h| + tiny.
//   score        fl(h - p): u (|h| + |p|), |p| <= (1 + g) ||q^|| ||x^||, at most 2u for D u < 1/2.
//
// With |q.x - q^.x^| <= ||q - q^|| ||x|| + ||q^|| ||x - x^||, the sum is
//   ||q|| (||x - x^|| + (g + 2u) ||x||) + ||q - q^|| ||x|| + 2u |h| + (D + 2) tiny (1 + ||q||).
// The bounds take max(||q||, ||q^||) for ||q||, and the same for x, as ||q^|| <= ||q|| + e_q.
// kSpare covers the rounding of the bounds themselves.
constexpr double kUnit = 5.9604644775390625e-08;  // 2^-24
constexpr double kTiny = 1.1754943508222875e-38;  // 2^-126
constexpr double kSpare = 1.0 + 1.0 / (1L << 20);

// ||x - x^|| and a bound on both ||x|| and ||x^||.
struct RowBounds {
    double residual, norm;

    RowBounds(const PackedRow& packed, std::int64_t dim)
        : residual(
              (std::sqrt(packed.squared_residual) + std::sqrt(static_cast<double>(dim)) * kTiny) *
              kSpare),
          norm((std::sqrt(packed.squared_norm) + residual) * kSpare) {}
};

PanelBounds bounds_of_panel(double residual,
                            double norm,
                            double largest_row_term,
                            std::int64_t dim) {
    const double d = static_cast<double>(dim);
    const double product_error = d * kUnit / (1.0 - d * kUnit);
    PanelBounds bounds;
    bounds.norm = norm;
    bounds.reach = (residual + (product_error + 2.0 * kUnit) * norm) * kSpare + (d + 2.0) * kTiny;
    bounds.slack = 2.0 * kUnit * largest_row_term * kSpare + (d + 2.0) * kTiny;
    return bounds;
}

// A row term that float32 cannot hold leaves the panel without a bound: all its rows stay in.
constexpr double kLargestRowTerm = 1.0e30;

std::int64_t count_panels(std::int64_t rows, int width) {
    return (rows + width - 1) / width;
}

std::vector<double> sampled_mean(const Rows& memory, Metric metric, const Kernels& kernels) {
    std::vector<double> mean(static_cast<std::size_t>(memory.dim), 0.0);
    const std::int64_t sampled = std::min(memory.num_rows, kSampledRows);
    for (std::int64_t i = 0; i < sampled; ++i) {
        const float* row = memory.row(i * memory.num_rows / sampled);
        const double scale = row_scale(row, memory.dim, metric, kernels);
        for (std::int64_t d = 0; d < memory.dim; ++d) {
            mean[static_cast<std::size_t>(d)] += static_cast<double>(row[d]) * scale;
        }
    }
    for (double& value : mean) {
        value /= static_cast<double>(sampled);
    }
    return mean;
}

}  // namespace

void AlignedFloats::reserve(std::int64_t count) {
    if (data_ == nullptr || count > capacity_) {
        const auto bytes =
            static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(float);
        data_.reset();
        data_.reset(static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
        capacity_ = count;
    }
}

void AlignedFloats::Free::operator()(float* p) const {
    ::operator delete(p, std::align_val_t{64});
}

double row_scale(const float* row, std::int64_t dim, Metric metric, const Kernels& kernels) {
    if (metric != Metric::kCosine) {
        return 1.0;
    }
    const double norm = std::sqrt(kernels.squared_norm(row, dim));
    return norm > 0.0 ? 1.0 / norm : 0.0;
}

void check_finite(const Rows& rows,
                  const char* name,
                  const Kernels& kernels,
                  Execution& execution) {
    const std::int64_t num_tasks = (rows.num_rows + kRowsPerTask - 1) / kRowsPerTask;
    std::vector<std::int64_t> bad(static_cast<std::size_t>(num_tasks), -1);
    execution.parallel_for(num_tasks, [&](std::int64_t task, int) {
        const std::int64_t end = std::min(rows.num_rows, (task + 1) * kRowsPerTask);
        for (std::int64_t i = task * kRowsPerTask; i < end; ++i) {
            // One value that is not finite makes the norm so; finite ones cannot, as 2^128 squared
            // is far inside float64.
            if (!std::isfinite(kernels.squared_norm(rows.row(i), rows.dim))) {
                bad[static_cast<std::size_t>(task)] = i;
                return;
            }
        }
    });
    for (const std::int64_t row : bad) {
        PYFEAT_CHECK(row < 0, name, " must be finite, got NaN or infinity in row ", row);
    }
}

Frame choose_frame(const Rows& memory,
                   Metric metric,
                   const Kernels& kernels,
                   Execution& execution) {
    Frame frame{metric, sampled_mean(memory, metric, kernels)};
    const std::int64_t num_tasks = (memory.num_rows + kRowsPerTask - 1) / kRowsPerTask;
    std::vector<double> largest(static_cast<std::size_t>(num_tasks), 0.0);
    execution.parallel_for(num_tasks, [&](std::int64_t task, int) {
        const std::int64_t end = std::min(memory.num_rows, (task + 1) * kRowsPerTask);
        double squared = 0.0;
        for (std::int64_t i = task * kRowsPerTask; i < end; ++i) {
            const float* row = memory.row(i);
            const double scale = row_scale(row, memory.dim, metric, kernels);
            squared = std::max(squared,
                               kernels.squared_distance(frame.mean.data(), row, scale, memory.dim));
        }
        largest[static_cast<std::size_t>(task)] = squared;
    });
    const double norm = std::sqrt(*std::max_element(largest.begin(), largest.end()));
    if (norm > 0.0) {
        frame.scale = std::ldexp(1.0, -std::ilogb(norm));
    }
    return frame;
}

void pack_memory(const Rows& memory,
                 std::int64_t first_row,
                 std::int64_t num_rows,
                 const Frame& frame,
                 const Kernels& kernels,
                 Execution& execution,
                 PackedRows& packed) {
    const int width = kernels.tile_rows;
    const std::int64_t dim = memory.dim;
    const std::int64_t num_panels = count_panels(num_rows, width);
    const std::int64_t panel_words = kernels.words(dim) * width;
    packed.first_row = first_row;
    packed.num_rows = num_rows;
    packed.num_panels = num_panels;
    packed.panel_words = panel_words;
    packed.values.reserve(num_panels * panel_words);
    packed.row_terms.reserve(num_panels * width);
    packed.bounds.resize(static_cast<std::size_t>(num_panels));
    const bool euclidean =
        frame.metric == Metric::kEuclidean || frame.metric == Metric::kSquaredEuclidean;
    execution.parallel_for(num_panels, [&](std::int64_t p, int) {
        float* panel = packed.values.data() + p * panel_words;
        float* row_terms = packed.row_terms.data() + p * width;
        const std::int64_t first = p * width;
        const int lanes = static_cast<int>(std::min<std::int64_t>(width, num_rows - first));
        if (lanes < width) {
            std::fill_n(panel, panel_words, 0.0F);
            std::fill_n(row_terms, width, std::numeric_limits<float>::quiet_NaN());
        }
        double largest_residual = 0.0, largest_norm = 0.0, largest_term = 0.0;
        for (int lane = 0; lane < lanes; ++lane) {
            const float* row = memory.row(first_row + first + lane);
            const PackedRow done = kernels.pack_row(row,
                                                    row_scale(row, dim, frame.metric, kernels),
                                                    dim,
                                                    frame.transform(),
                                                    panel,
                                                    width,
                                                    lane);
            // q.x = (q - mean).(x - mean) + mean.(x - mean) + q.mean, the last equal for all rows.
            const double term = euclidean ? 0.5 * done.squared_norm : -done.mean_product;
            const bool fits = std::abs(term) <= kLargestRowTerm;
            row_terms[lane] = fits ? static_cast<float>(term) : 0.0F;
            const RowBounds bounds(done, dim);
            largest_residual = std::max(largest_residual, bounds.residual);
            largest_norm = std::max(largest_norm, bounds.norm);
            largest_term = std::max(
                largest_term, fits ? std::abs(term) : std::numeric_limits<double>::infinity());
        }
        packed.bounds[static_cast<std::size_t>(p)] =
            bounds_of_panel(largest_residual, largest_norm, largest_term, dim);
    });
}

PackedQueries pack_queries(const Rows& queries,
                           std::int64_t first_query,
                           std::int64_t num_queries,
                           const Frame& frame,
                           const Kernels& kernels,
                           Execution& execution) {
    const int width = kernels.tile_queries;
    const std::int64_t dim = queries.dim;
    const std::int64_t num_panels = count_panels(num_queries, width);
    const std::int64_t panel_words = kernels.words(dim) * width;
    const auto slots = static_cast<std::size_t>(num_panels * width);
    PackedQueries packed{num_queries,
                         num_panels,
                         panel_words,
                         AlignedFloats(),
                         std::vector<double>(slots, kNaN),
                         std::vector<double>(slots, kNaN)};
    packed.values.reserve(num_panels * panel_words);
    execution.parallel_for(num_panels, [&](std::int64_t p, int) {
        float* panel = packed.values.data() + p * panel_words;
        const std::int64_t first = p * width;
        const int lanes = static_cast<int>(std::min<std::int64_t>(width, num_queries - first));
        if (lanes < width) {
            std::fill_n(panel, panel_words, 0.0F);
        }
        for (int lane = 0; lane < lanes; ++lane) {
            const float* row = queries.row(first_query + first + lane);
            const RowBounds bounds(kernels.pack_row(row,
                                                    row_scale(row, dim, frame.metric, kernels),
                                                    dim,
                                                    frame.transform(),
                                                    panel,
                                                    width,
                                                    lane),
                                   dim);
            const auto slot = static_cast<std::size_t>(first + lane);
            packed.norms[slot] = bounds.norm + kTiny;
            packed.residuals[slot] = bounds.residual;
        }
    });
    return packed;
}

}  // namespace pyfeat
