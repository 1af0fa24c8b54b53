// SPDX-License-Identifier: Apache-2.0
// Arithmetic of one pair of rows of A and B: its similarity, whether it counts, and what becomes of
// it in the losses. The CPU tests call the same functions.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

// Similarities times this are exponents of 2, which is what the GPU has an instruction for.
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLog2 = 0.6931471805599453;

// The similarities S = scale A B^T + column_bias of a launch, in units of 1 / unit.
struct SimilarityParams {
    PairTerms pairs;
    const double* scale;                 // []
    double unit;                         // kLog2E for exponents of 2, or 1
    std::int32_t num_rows, num_columns;  // of a launch; offsets in memory have 64 bits
};

// The scale times the unit as a sum of two float32 numbers: a similarity is rounded once more than
// its product, as scale * (A B^T) is.
struct SplitScale {
    float high, low;
};
PYFEAT_HOST_DEVICE inline SplitScale split_scale(double scale) {
    const auto high = static_cast<float>(scale);
    return {high, static_cast<float>(scale - static_cast<double>(high))};
}

// What is said of a row and of a column. Ids and groups that are not given equal none; a column
// that does not exist has a similarity of minus infinity.
struct RowSaid {
    std::int32_t id, group;
    bool live;
};
struct ColumnSaid {
    float bias;
    std::int32_t id, group;
};
PYFEAT_HOST_DEVICE inline RowSaid said_of_row(const SimilarityParams& params, std::int32_t row) {
    const PairTerms& pairs = params.pairs;
    const bool live = row < params.num_rows;
    return {live && pairs.row_ids != nullptr ? pairs.row_ids[row] : -1,
            live && pairs.row_groups != nullptr ? pairs.row_groups[row] : -1,
            live};
}
PYFEAT_HOST_DEVICE inline float bias_of_column(const SimilarityParams& params,
                                               std::int32_t column) {
    const float* bias = params.pairs.column_bias;
    return bias != nullptr ? bias[column] * static_cast<float>(params.unit) : 0.0F;
}
PYFEAT_HOST_DEVICE inline ColumnSaid said_of_column(const SimilarityParams& params,
                                                    std::int32_t column) {
    const PairTerms& pairs = params.pairs;
    if (column >= params.num_columns) {
        return {-INFINITY, -2, -2};
    }
    return {bias_of_column(params, column),
            pairs.column_ids != nullptr ? pairs.column_ids[column] : -2,
            pairs.column_groups != nullptr ? pairs.column_groups[column] : -2};
}

PYFEAT_HOST_DEVICE inline float similarity(float product, SplitScale scale, float bias) {
    return fmaf(product, scale.high, fmaf(product, scale.low, bias));
}

// Whether a pair exists and is not left out, and whether it is positive.
struct PairKind {
    bool counted, positive;
};
PYFEAT_HOST_DEVICE inline PairKind kind_of(const PairTerms& pairs,
                                           const RowSaid& row,
                                           const ColumnSaid& column) {
    const bool same = row.id == column.id;
    const bool counted = row.live && (row.group != column.group || (pairs.keep_positives && same));
    return {counted, same && counted};
}

// What is added to the exponents of positive pairs and of others: 0, or -infinity where they are
// not in the log-sum-exps. As numbers, flags cost a pair one selection.
struct PowerOffsets {
    float of_positives, of_others;

    PYFEAT_HOST_DEVICE float exponent(float z, PairKind kind) const {
        return kind.counted ? z + (kind.positive ? of_positives : of_others) : -INFINITY;
    }
};
PYFEAT_HOST_DEVICE inline PowerOffsets power_offsets(const PairTerms& pairs) {
    return {pairs.separate_positives ? -INFINITY : 0.0F, pairs.only_positives ? -INFINITY : 0.0F};
}

// The gradient of sums of a line by its similarities: weight 2^(z - shift) for z = S / ln 2, plus
// `positive` where a pair is. With a whole shift, z - shift is exact where it matters.
struct LineGradient {
    float shift, weight, positive;
};
constexpr float kNoPower = 1e38F;  // a shift that leaves no power of 2
PYFEAT_HOST_DEVICE inline LineGradient line_gradient(double lse,
                                                     double weight,
                                                     double positive,
                                                     double factor) {
    const auto pulled = static_cast<float>(factor * positive);
    const double exponent = lse * kLog2E;
    if (!(exponent > -INFINITY)) {
        return {kNoPower, 0.0F, pulled};  // nothing counts
    }
    const double shift = floor(exponent + 0.5);
    return {static_cast<float>(shift),
            static_cast<float>(factor * weight * exp2(shift - exponent)),
            pulled};
}

// log(1 + t) for 0 <= t <= 1 without a loss of digits near 0.
PYFEAT_HOST_DEVICE inline float log_one_plus(float t) {
    // 2 artanh(s) with s = t / (2 + t) <= 1 / 3: what the series leaves out is s^14 / 15 < 2^-25 of
    // it. The GPU's own logarithm has an absolute error near 1.
    const float s = t / (2.0F + t);
    const float u = s * s;
    float series = fmaf(u, 1.0F / 13.0F, 1.0F / 11.0F);
    series = fmaf(u, series, 1.0F / 9.0F);
    series = fmaf(u, series, 1.0F / 7.0F);
    series = fmaf(u, series, 1.0F / 5.0F);
    series = fmaf(u, series, 1.0F / 3.0F);
    return 2.0F * fmaf(s * u, series, s);
}

// Of z = y (S + bias), y -1 for positive pairs and 1 for others: softplus(z) and y sigmoid(z), with
// t = exp(-|z|).
struct Softplus {
    float value, sigmoid;
};
PYFEAT_HOST_DEVICE inline Softplus softplus_of(float z, float t, bool positive) {
    const float sigmoid = (z >= 0.0F ? 1.0F : t) / (1.0F + t);
    return {(z > 0.0F ? z : 0.0F) + log_one_plus(t), positive ? -sigmoid : sigmoid};
}

// A sum of powers of 2 relative to the largest exponent.
struct PowerSum {
    float top, sum;  // -infinity and 0 of none
};
// What powers are taken relative to: their sum is 0 where none counts.
PYFEAT_HOST_DEVICE inline float finite_shift(float top) {
    return top == -INFINITY ? 0.0F : top;
}

}  // namespace pyfeat::cuda
