// SPDX-License-Identifier: Apache-2.0
// Rows in the order that tiles read them, with what is needed to bound the error of a tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/blocks.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Which kernels run.
struct Engine {
    const Kernels* kernels;
    Precision precision;
    double bound_scale;  // 1, or less to show that answers then go wrong

    const TileKernels& tiles() const {
        return kernels->tile_kernels(precision);
    }
    const RowKernels& rows(Dtype dtype) const {
        return kernels->row_kernels(dtype);
    }
};

// The coordinates in which rows are packed. Distances do not change when a common mean is
// subtracted, and the products lose less; the scale brings most rows near length 1.
struct Frame {
    Metric metric;
    std::vector<double> mean;  // [D], of at most 4,096 evenly spaced rows
    double scale = 1.0;        // a power of two: the largest norm of these comes to lie in [1, 2)

    Transform transform() const {
        return {mean.data(), scale};
    }
};

// Whether a row can be searched: not NaN, not infinite, and far enough from the largest float64
// for its distances to stay finite.
inline bool is_usable(double squared_norm) {
    return squared_norm <= 1.0e300;
}

// Throws "<op>: <name> must be finite, ..." with the first row that is not usable.
void check_finite(const Rows& rows,
                  const char* op,
                  const char* name,
                  const Kernels& kernels,
                  Execution& execution);
[[noreturn]] void refuse_row(const char* op, const char* name, Dtype dtype, std::int64_t row);

// Rows that are not usable do not count.
Frame choose_frame(const Rows& memory, Metric metric, const Kernels& kernels);

// 1 / ||row|| for the cosine metric (0 for a zero row), else 1.
double row_scale(double squared_norm, Metric metric);

// A range of memory rows, NR to a panel; rows that are not there have score NaN.
struct PackedRows {
    std::int64_t first_row = 0, num_rows = 0, num_panels = 0;
    std::int64_t panel_words = 0;           // 4-byte words of one panel
    AlignedFloats values;                   // [num_panels, panel_words]
    AlignedFloats row_terms;                // [num_panels, NR]
    AlignedFloats row_units;                // [num_panels, NR]
    std::vector<ErrorBounds> row_bounds;    // [num_panels, NR]
    std::vector<ErrorBounds> panel_bounds;  // [num_panels]

    const float* panel(std::int64_t index) const {
        return values.data() + index * panel_words;
    }
};

// Fills `packed`, whose buffers are used again: new ones would cost a page fault every 4 KB.
// Returns the first row that is not usable, or -1; such rows have score NaN.
std::int64_t pack_memory(const Rows& memory,
                         std::int64_t first_row,
                         std::int64_t num_rows,
                         const Frame& frame,
                         const Engine& engine,
                         Execution& execution,
                         PackedRows& packed);

// Of a transformed query.
struct QueryTerms {
    double squared_norm, mean_product;
};

// Some of the queries, MR to a panel.
struct PackedQueries {
    std::int64_t num_queries = 0, num_panels = 0;
    std::int64_t panel_words = 0;
    AlignedFloats values;           // [num_panels, panel_words]
    std::vector<float> units;       // [num_panels * MR]
    std::vector<float> norms;       // [num_panels * MR], >= ||q|| packed or not
    std::vector<float> residuals;   // [num_panels * MR], e_q
    std::vector<QueryTerms> terms;  // [num_panels * MR]
    // Of queries so far from the mean that every row lies within the error of every other, and of
    // those that fill up the last panel: nothing is searched for them.
    std::vector<char> beyond;  // [num_panels * MR]

    const float* panel(std::int64_t index) const {
        return values.data() + index * panel_words;
    }
};

// queries.row(ids[i]) for every i; they must be usable.
PackedQueries pack_queries(const Rows& queries,
                           const std::vector<std::int64_t>& ids,
                           const Frame& frame,
                           const Engine& engine,
                           Execution& execution);

// Between which a score lies.
struct ScoreRange {
    float lower, upper;
};

// float32 at or above / at or below a float64 value: the nearest float is off by at most 2^-24 of
// the value, or 2^-150 where it underflows.
inline float round_up(double value) {
    return static_cast<float>(value + (value < 0.0 ? -value : value) * 0x1p-23 + 0x1p-149);
}
inline float round_down(double value) {
    return static_cast<float>(value - (value < 0.0 ? -value : value) * 0x1p-23 - 0x1p-149);
}

}  // namespace pyfeat
