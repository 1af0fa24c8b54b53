// SPDX-License-Identifier: Apache-2.0
// Rows in the order that tiles read them, with what is needed to bound the error of a tile.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/similarity/kernels.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// Floats on a 64-byte boundary, uninitialised.
class AlignedFloats {
  public:
    // Room for `count` values; what was there is lost if that takes a new block.
    void reserve(std::int64_t count);

    float* data() {
        return data_.get();
    }
    const float* data() const {
        return data_.get();
    }

  private:
    struct Free {
        void operator()(float* p) const;
    };
    std::unique_ptr<float, Free> data_;
    std::int64_t capacity_ = 0;
};

// The coordinates in which rows are packed. Distances do not change when a common mean is
// subtracted, and the float32 products lose less; the scale keeps squares inside float32's range.
struct Frame {
    Metric metric;
    std::vector<double> mean;  // [D], of at most 4,096 evenly spaced rows
    double scale = 1.0;        // a power of two: the largest row norm comes to lie in [1, 2)

    Transform transform() const {
        return {mean.data(), scale};
    }
};

// Throws "<name> must be finite, ..." with the first row that holds NaN or infinity.
void check_finite(const Rows& rows, const char* name, const Kernels& kernels, Execution& execution);

Frame choose_frame(const Rows& memory, Metric metric, const Kernels& kernels, Execution& execution);

// 1 / ||row|| for the cosine metric (0 for a zero row), else 1.
double row_scale(const float* row, std::int64_t dim, Metric metric, const Kernels& kernels);

// Bounds that hold for every row of one panel, in the frame's units. For query q and row x
//   |score - exact score| <= ||q|| * reach + e_q * norm + slack,   e_q >= ||q - q_packed||.
struct PanelBounds {
    double norm = 0.0;
    double reach = 0.0;
    double slack = 0.0;
};

// A range of memory rows, NR to a panel; the last panel is filled up with rows of score NaN.
struct PackedRows {
    std::int64_t first_row = 0, num_rows = 0, num_panels = 0;
    std::int64_t panel_words = 0;     // 4-byte words of one panel
    AlignedFloats values;             // [num_panels, panel_words]
    AlignedFloats row_terms;          // [num_panels, NR]
    std::vector<PanelBounds> bounds;  // [num_panels]

    const float* panel(std::int64_t index) const {
        return values.data() + index * panel_words;
    }
};

// Fills `packed`, whose buffers are used again: new ones would cost a page fault every 4 KB.
void pack_memory(const Rows& memory,
                 std::int64_t first_row,
                 std::int64_t num_rows,
                 const Frame& frame,
                 const Kernels& kernels,
                 Execution& execution,
                 PackedRows& packed);

// A range of queries, MR to a panel; norm is NaN for the queries that fill up the last panel.
struct PackedQueries {
    std::int64_t num_queries = 0, num_panels = 0;
    std::int64_t panel_words = 0;
    AlignedFloats values;           // [num_panels, panel_words]
    std::vector<double> norms;      // [num_panels * MR], >= ||q|| packed or not
    std::vector<double> residuals;  // [num_panels * MR], e_q

    const float* panel(std::int64_t index) const {
        return values.data() + index * panel_words;
    }
};

PackedQueries pack_queries(const Rows& queries,
                           std::int64_t first_query,
                           std::int64_t num_queries,
                           const Frame& frame,
                           const Kernels& kernels,
                           Execution& execution);

// Queries further from the mean than this, in units of the memory's largest row, are not worth a
// tile: every row lies within the error bound of every other. Also keeps products finite.
constexpr double kLargestQueryNorm = 1.0e12;

}  // namespace pyfeat
