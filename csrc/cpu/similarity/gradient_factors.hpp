// SPDX-License-Identifier: Apache-2.0
// The factors of products with a matrix dS, packed, and the sums that those products add up in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/products.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

// A factor in the order in which gradients are multiplied with it: panels of NR features, of one
// row or a pair of rows in a word.
struct FeaturePanels {
    std::int64_t num_words = 0, num_panels = 0, dim = 0;
    int width = 0, packed_values = 1;
    AlignedFloats values;  // [num_panels, num_words, width]

    // From this row on, the first of a panel of S.
    const float* panel(std::int64_t index, std::int64_t row) const {
        return values.data() + (index * num_words + row / packed_values) * width;
    }
};

// The values of two rows in one word; bfloat16 ones lose nothing.
inline float pair_of(float first, float second) {
    std::uint32_t low, high;
    std::memcpy(&low, &first, sizeof(low));
    std::memcpy(&high, &second, sizeof(high));
    const std::uint32_t word = (low >> 16) | (high & 0xFFFF0000U);
    float pair;
    std::memcpy(&pair, &word, sizeof(pair));
    return pair;
}

inline void pack_features(const Rows& rows,
                          const ContrastEngine& engine,
                          Execution& execution,
                          FeaturePanels& packed) {
    constexpr std::int64_t kPerTask = 64;  // words
    packed.width = engine.tiles.rows;
    packed.packed_values = engine.tiles.packed_values;
    packed.dim = rows.dim;
    packed.num_words = engine.tiles.words(rows.num_rows);
    packed.num_panels = (rows.dim + packed.width - 1) / packed.width;
    packed.values.reserve(packed.num_panels * packed.num_words * packed.width);
    const RowKernels& row_kernels = engine.kernels.row_kernels(rows.dtype);
    execution.parallel_for(
        (packed.num_words + kPerTask - 1) / kPerTask, [&](std::int64_t task, int) {
            const std::int64_t end = std::min(packed.num_words, (task + 1) * kPerTask);
            for (std::int64_t word = task * kPerTask; word < end; ++word) {
                const std::int64_t row = word * packed.packed_values;
                for (std::int64_t p = 0; p < packed.num_panels; ++p) {
                    const std::int64_t d = p * packed.width;
                    const std::int64_t dim = std::min<std::int64_t>(packed.width, rows.dim - d);
                    float* to = packed.values.data() + (p * packed.num_words + word) * packed.width;
                    // Rows that fill up a word, or the last words, are zeros.
                    const auto load = [&](std::int64_t index, float* values) {
                        const bool there = index < rows.num_rows;
                        if (there) {
                            row_kernels.load_floats(rows.row(index, d), 1.0, dim, 1, values);
                        }
                        std::fill(values + (there ? dim : 0), values + packed.width, 0.0F);
                    };
                    load(row, to);
                    if (packed.packed_values == 1) {
                        continue;
                    }
                    float next[kMaxTileRows];
                    load(row + 1, next);
                    std::transform(to, to + packed.width, next, to, pair_of);
                }
            }
        });
}

// Running sums of `unit` times a product [num_rows, dim], [rows, panels * NR]: in the product
// itself if its rows are as wide, on 64-byte boundaries and of unit 1.
class ProductSums {
  public:
    void start(const Rows& rows,
               const FeaturePanels& values,
               std::int64_t padding,
               double unit,
               float* product,
               Execution& execution) {
        num_rows_ = rows.num_rows;
        dim_ = values.dim;
        unit_ = unit;
        product_ = product;
        stride_ = values.num_panels * values.width;
        const bool fits =
            unit == 1.0 && dim_ == stride_ && reinterpret_cast<std::uintptr_t>(product) % 64 == 0;
        if (!fits) {
            values_.reserve((num_rows_ + padding) * stride_);
        }
        sums_ = fits ? product : values_.data();
        for_rows(execution, [&](std::int64_t row) { std::fill_n(this->row(row), stride_, 0.0F); });
    }

    std::int64_t stride() const {
        return stride_;
    }
    float* row(std::int64_t index) const {
        return sums_ + index * stride_;
    }
    void write(Execution& execution) const {
        if (sums_ == product_) {
            return;
        }
        for_rows(execution, [&](std::int64_t index) {
            const float* sums = row(index);
            std::transform(sums, sums + dim_, product_ + index * dim_, [&](float sum) {
                return static_cast<float>(unit_ * static_cast<double>(sum));
            });
        });
    }

  private:
    template <typename Use>
    void for_rows(Execution& execution, Use use) const {
        constexpr std::int64_t kPerTask = 64;
        execution.parallel_for((num_rows_ + kPerTask - 1) / kPerTask, [&](std::int64_t task, int) {
            const std::int64_t end = std::min(num_rows_, (task + 1) * kPerTask);
            for (std::int64_t row = task * kPerTask; row < end; ++row) {
                use(row);
            }
        });
    }

    std::int64_t num_rows_ = 0, dim_ = 0, stride_ = 0;
    double unit_ = 1.0;
    float* product_ = nullptr;
    float* sums_ = nullptr;
    AlignedFloats values_;
};

}  // namespace pyfeat
