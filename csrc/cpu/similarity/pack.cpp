// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/pack.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "check.hpp"

namespace pyfeat {
namespace {

constexpr std::int64_t kSampledRows = 4096;
constexpr std::int64_t kRowsPerTask = 128;

// Error of one packed score. Everything is in the frame's units; u = 2^-24, x and q are the exact
// transformed row and query, x^ and q^ what is packed.
//
//   packing      ||x - x^|| is measured in float64, and ||q - q^|| too; the product may treat
//                subnormal values as zero, at most sqrt(D) tiny more, tiny = 2^-126.
//   product      n roundings in all, in any one order. Floats: D multiply-adds in float32, fused or
//                not (products of bfloat16 are exact), n = D; n = 2 D + 2 covers units that add up
//                parts of 32 features apart. Whole numbers: exact sums, then n = 4 roundings to
//                give them their units back. Each may also lose a subnormal result. |p - q^.x^| <=
//                g ||q^|| ||x^|| + (n + D) tiny,  g = n u / (1 - n u).
//   row term     h (half the squared norm, or -mean.x) rounded once: u |h| + tiny.
//   score        fl(h - p): u (|h| + |p|), |p| <= (1 + g) ||q^|| ||x^||, at most 2u for n u < 1/2.
//
// With |q.x - q^.x^| <= ||q - q^|| ||x|| + ||q^|| ||x - x^||, the sum is
//   ||q|| (||x - x^|| + (g + 2u) ||x||) + ||q - q^|| ||x|| + 2u |h| + (n + D + 2) tiny (1 + ||q||).
// The bounds take max(||q||, ||q^||) for ||q||, and the same for x, as ||q^|| <= ||q|| + e_q.
// kSpare covers the rounding of the bounds themselves.
constexpr double kUnit = 5.9604644775390625e-08;  // 2^-24
constexpr double kTiny = 1.1754943508222875e-38;  // 2^-126
constexpr double kSpare = 1.0 + 1.0 / (1L << 20);

// ||x - x^|| and a bound on both ||x|| and ||x^||.
struct Lengths {
    double residual, norm;

    Lengths(double squared_norm, double squared_residual, std::int64_t dim)
        : residual((std::sqrt(squared_residual) + std::sqrt(static_cast<double>(dim)) * kTiny) *
                   kSpare),
          norm((std::sqrt(squared_norm) + residual) * kSpare) {}
};

ErrorBounds error_bounds(const Lengths& row,
                         double row_term,
                         const Engine& engine,
                         std::int64_t dim) {
    const TileKernels& tiles = engine.tiles();
    const double d = static_cast<double>(dim);
    const double roundings = tiles.roundings_per_feature * d + tiles.roundings;
    const double product_error = roundings * kUnit / (1.0 - roundings * kUnit);
    const double lost = (roundings + d + 2.0) * kTiny;
    const double reach = (row.residual + (product_error + 2.0 * kUnit) * row.norm) * kSpare;
    const double slack = 2.0 * kUnit * std::abs(row_term) * kSpare;
    return {round_up(row.norm * engine.bound_scale),
            round_up((reach + lost) * engine.bound_scale),
            round_up((slack + lost) * engine.bound_scale)};
}

// A row much longer than the frame's unit could overflow float32. It is packed as zeros and has no
// bound: it stays in every shortlist.
constexpr double kLargestSquaredNorm = 1.0e30;
constexpr ErrorBounds kNoBound{0.0F, 0.0F, std::numeric_limits<float>::infinity()};
// Queries further out are not worth a tile: the products lose too many digits to tell rows apart.
constexpr double kLargestSquaredQueryNorm = 1.0e24;

std::int64_t count_panels(std::int64_t rows, int width) {
    return (rows + width - 1) / width;
}

// What a panel holds of one row beside its features.
struct PackedLane {
    float term = std::numeric_limits<float>::quiet_NaN();
    float unit = 0.0F;
    ErrorBounds bounds;
    bool usable = true;
};

void pack_nothing(const TileKernels& tiles, float* panel, int lane, std::vector<double>& values) {
    std::fill(values.begin(), values.end(), 0.0);
    tiles.pack_row(values.data(), static_cast<std::int64_t>(values.size()), 0.0, panel, lane);
}

PackedLane pack_lane(const Rows& memory,
                     std::int64_t row,
                     const Frame& frame,
                     const Engine& engine,
                     float* panel,
                     int lane,
                     std::vector<double>& values) {
    const TileKernels& tiles = engine.tiles();
    const RowKernels& row_kernels = engine.rows(memory.dtype);
    const std::int64_t dim = memory.dim;
    PackedLane done;
    const double raw = row_kernels.squared_norm(memory.row(row), dim);
    if (!is_usable(raw)) {
        pack_nothing(tiles, panel, lane, values);
        done.usable = false;
        return done;
    }
    const TransformedRow transformed = row_kernels.transform(
        memory.row(row), row_scale(raw, frame.metric), dim, frame.transform(), values.data());
    // q.x = (q - mean).(x - mean) + mean.(x - mean) + q.mean, the last equal for all rows.
    const bool euclidean =
        frame.metric == Metric::kEuclidean || frame.metric == Metric::kSquaredEuclidean;
    const double term = euclidean ? 0.5 * transformed.squared_norm : -transformed.mean_product;
    if (!(transformed.squared_norm <= kLargestSquaredNorm) ||
        !(std::abs(term) <= kLargestSquaredNorm)) {
        pack_nothing(tiles, panel, lane, values);
        done.term = 0.0F;
        done.bounds = kNoBound;
        return done;
    }
    const RoundedRow rounded = tiles.pack_row(values.data(), dim, transformed.largest, panel, lane);
    const Lengths lengths(transformed.squared_norm, rounded.squared_residual, dim);
    done.term = static_cast<float>(term);
    done.unit = rounded.unit;
    done.bounds = error_bounds(lengths, term, engine, dim);
    return done;
}

void lower(std::atomic<std::int64_t>& least, std::int64_t value) {
    std::int64_t seen = least.load();
    while ((seen < 0 || value < seen) && !least.compare_exchange_weak(seen, value)) {
    }
}

}  // namespace

double row_scale(double squared_norm, Metric metric) {
    if (metric != Metric::kCosine) {
        return 1.0;
    }
    return squared_norm > 0.0 ? 1.0 / std::sqrt(squared_norm) : 0.0;
}

void refuse_row(const char* op, const char* name, Dtype dtype, std::int64_t row) {
    const char* limit = dtype == Dtype::kFloat64 ? " and of norm below 1e150" : "";
    const char* found = dtype == Dtype::kFloat64 ? "other values" : "NaN or infinity";
    fail(op, ": ", name, " must be finite", limit, ", got ", found, " in row ", row);
}

void check_finite(const Rows& rows,
                  const char* op,
                  const char* name,
                  const Kernels& kernels,
                  Execution& execution) {
    const RowKernels& row_kernels = kernels.row_kernels(rows.dtype);
    const std::int64_t num_tasks = (rows.num_rows + kRowsPerTask - 1) / kRowsPerTask;
    std::atomic<std::int64_t> bad{-1};
    execution.parallel_for(num_tasks, [&](std::int64_t task, int) {
        const std::int64_t end = std::min(rows.num_rows, (task + 1) * kRowsPerTask);
        for (std::int64_t i = task * kRowsPerTask; i < end; ++i) {
            if (!is_usable(row_kernels.squared_norm(rows.row(i), rows.dim))) {
                lower(bad, i);
                return;
            }
        }
    });
    if (bad >= 0) {
        refuse_row(op, name, rows.dtype, bad);
    }
}

Frame choose_frame(const Rows& memory, Metric metric, const Kernels& kernels) {
    const RowKernels& row_kernels = kernels.row_kernels(memory.dtype);
    const auto dim = static_cast<std::size_t>(memory.dim);
    const std::int64_t sampled = std::min(memory.num_rows, kSampledRows);
    Frame frame{metric, std::vector<double>(dim, 0.0)};
    std::vector<double> row(dim);
    const auto for_each_sample = [&](auto use) {
        for (std::int64_t i = 0; i < sampled; ++i) {
            // Samples are evenly spaced without forming i * N, which could overflow.
            const std::int64_t index =
                i * (memory.num_rows / sampled) + i * (memory.num_rows % sampled) / sampled;
            const double squared = row_kernels.squared_norm(memory.row(index), memory.dim);
            if (is_usable(squared)) {
                use(memory.row(index), row_scale(squared, metric));
            }
        }
    };
    std::int64_t usable = 0;
    for_each_sample([&](const void* data, double scale) {
        row_kernels.load(data, scale, memory.dim, row.data());
        for (std::size_t d = 0; d < dim; ++d) {
            frame.mean[d] += row[d];
        }
        ++usable;
    });
    for (double& value : frame.mean) {
        value /= static_cast<double>(std::max<std::int64_t>(usable, 1));
    }
    double squared = 0.0;
    for_each_sample([&](const void* data, double scale) {
        squared = std::max(
            squared, row_kernels.squared_distance(frame.mean.data(), data, scale, memory.dim));
    });
    const double norm = std::sqrt(squared);
    if (norm > 0.0) {
        frame.scale = std::ldexp(1.0, -std::ilogb(norm));
    }
    return frame;
}

std::int64_t pack_memory(const Rows& memory,
                         std::int64_t first_row,
                         std::int64_t num_rows,
                         const Frame& frame,
                         const Engine& engine,
                         Execution& execution,
                         PackedRows& packed) {
    const TileKernels& tiles = engine.tiles();
    const int width = tiles.rows;
    const std::int64_t dim = memory.dim;
    const std::int64_t num_panels = count_panels(num_rows, width);
    const std::int64_t panel_words = tiles.row_words(dim) * width;
    packed.first_row = first_row;
    packed.num_rows = num_rows;
    packed.num_panels = num_panels;
    packed.panel_words = panel_words;
    packed.values.reserve(num_panels * panel_words);
    packed.row_terms.reserve(num_panels * width);
    packed.row_units.reserve(num_panels * width);
    packed.row_bounds.resize(static_cast<std::size_t>(num_panels * width));
    packed.panel_bounds.resize(static_cast<std::size_t>(num_panels));
    std::atomic<std::int64_t> unusable{-1};

    const auto pack_panel = [&](std::int64_t p, std::vector<double>& values) {
        float* panel = packed.values.data() + p * panel_words;
        ErrorBounds largest;
        for (int lane = 0; lane < width; ++lane) {
            const std::int64_t row = p * width + lane;
            PackedLane done;
            if (row < num_rows) {
                done = pack_lane(memory, first_row + row, frame, engine, panel, lane, values);
            } else {
                pack_nothing(tiles, panel, lane, values);
            }
            if (!done.usable) {
                lower(unusable, first_row + row);
            }
            packed.row_terms.data()[row] = done.term;
            packed.row_units.data()[row] = done.unit;
            packed.row_bounds[static_cast<std::size_t>(row)] = done.bounds;
            largest.norm = std::max(largest.norm, done.bounds.norm);
            largest.reach = std::max(largest.reach, done.bounds.reach);
            largest.slack = std::max(largest.slack, done.bounds.slack);
        }
        packed.panel_bounds[static_cast<std::size_t>(p)] = largest;
    };

    constexpr std::int64_t kPanelsPerTask = 8;
    execution.parallel_for(count_panels(num_panels, kPanelsPerTask), [&](std::int64_t task, int) {
        std::vector<double> values(static_cast<std::size_t>(dim));
        const std::int64_t end = std::min(num_panels, (task + 1) * kPanelsPerTask);
        for (std::int64_t p = task * kPanelsPerTask; p < end; ++p) {
            pack_panel(p, values);
        }
    });
    return unusable;
}

PackedQueries pack_queries(const Rows& queries,
                           const std::vector<std::int64_t>& ids,
                           const Frame& frame,
                           const Engine& engine,
                           Execution& execution) {
    const TileKernels& tiles = engine.tiles();
    const RowKernels& row_kernels = engine.rows(queries.dtype);
    const int width = tiles.queries;
    const std::int64_t dim = queries.dim;
    const auto num_queries = static_cast<std::int64_t>(ids.size());
    const std::int64_t num_panels = count_panels(num_queries, width);
    const std::int64_t panel_words = tiles.words(dim) * width;
    const auto slots = static_cast<std::size_t>(num_panels * width);
    PackedQueries packed{num_queries,
                         num_panels,
                         panel_words,
                         AlignedFloats(),
                         std::vector<float>(slots, 0.0F),
                         std::vector<float>(slots, 0.0F),
                         std::vector<float>(slots, 0.0F),
                         std::vector<QueryTerms>(slots),
                         std::vector<char>(slots, 1)};
    packed.values.reserve(num_panels * panel_words);
    execution.parallel_for(num_panels, [&](std::int64_t p, int) {
        std::vector<double> values(static_cast<std::size_t>(dim));
        float* panel = packed.values.data() + p * panel_words;
        for (int lane = 0; lane < width; ++lane) {
            const std::int64_t query = p * width + lane;
            TransformedRow transformed{0.0, 0.0, 0.0};
            const auto slot = static_cast<std::size_t>(query);
            if (query < num_queries) {
                const void* row = queries.row(ids[slot]);
                const double scale = row_scale(row_kernels.squared_norm(row, dim), frame.metric);
                transformed =
                    row_kernels.transform(row, scale, dim, frame.transform(), values.data());
                packed.beyond[slot] = transformed.squared_norm <= kLargestSquaredQueryNorm ? 0 : 1;
            }
            if (packed.beyond[slot] != 0) {
                std::fill(values.begin(), values.end(), 0.0);
                transformed = {0.0, 0.0, 0.0};
            }
            const RoundedRow rounded =
                tiles.pack_query(values.data(), dim, transformed.largest, panel, lane);
            const Lengths lengths(transformed.squared_norm, rounded.squared_residual, dim);
            packed.units[slot] = rounded.unit;
            packed.terms[slot] = {transformed.squared_norm, transformed.mean_product};
            packed.norms[slot] = round_up(lengths.norm + kTiny);
            packed.residuals[slot] = round_up(lengths.residual);
        }
    });
    return packed;
}

}  // namespace pyfeat
