// SPDX-License-Identifier: Apache-2.0
// float64 sums over features. Element d always goes to partial sum d mod 16 and the 16 are added
// in one order, and the build forbids contraction to fused multiply-add, so every instruction set
// returns the same bits. The loops are plain C++: 16 lanes map onto whatever registers there are.
#pragma once

#include "cpu/simd/elements.hpp"
#include "cpu/similarity/kernels.hpp"

namespace {

constexpr int kSums = 16;

struct PartialSums {
    double at[kSums];

    PartialSums() {
        for (double& sum : at) {
            sum = 0.0;
        }
    }

    double total() {
        for (int half = kSums / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) {
                at[i] += at[i + half];
            }
        }
        return at[0];
    }
};

// Adds term(d) for every d in [0, dim).
template <typename Term>
inline double sum_over(std::int64_t dim, Term term) {
    PartialSums sums;
    const std::int64_t whole = dim - dim % kSums;
    for (std::int64_t d = 0; d < whole; d += kSums) {
        for (int i = 0; i < kSums; ++i) {
            sums.at[i] += term(d + i);
        }
    }
    for (std::int64_t d = whole; d < dim; ++d) {
        sums.at[d - whole] += term(d);
    }
    return sums.total();
}

template <typename Element>
double squared_norm(const void* row, std::int64_t dim) {
    const auto* x = static_cast<const Element*>(row);
    return sum_over(dim, [=](std::int64_t d) {
        const auto value = static_cast<double>(x[d]);
        return value * value;
    });
}

template <typename Element>
double dot(const double* query, const void* row, std::int64_t dim) {
    const auto* x = static_cast<const Element*>(row);
    return sum_over(dim, [=](std::int64_t d) { return query[d] * static_cast<double>(x[d]); });
}

template <typename Element>
double squared_distance(const double* query, const void* row, double row_scale, std::int64_t dim) {
    const auto* x = static_cast<const Element*>(row);
    return sum_over(dim, [=](std::int64_t d) {
        const double difference = query[d] - static_cast<double>(x[d]) * row_scale;
        return difference * difference;
    });
}

template <typename Element>
void load_row(const void* row, double row_scale, std::int64_t dim, double* values) {
    const auto* x = static_cast<const Element*>(row);
    for (std::int64_t d = 0; d < dim; ++d) {
        values[d] = static_cast<double>(x[d]) * row_scale;
    }
}

template <typename Element>
void load_floats(
    const void* row, double row_scale, std::int64_t dim, std::int64_t stride, float* values) {
    const auto* x = static_cast<const Element*>(row);
    if (stride == 1) {
        for (std::int64_t d = 0; d < dim; ++d) {
            values[d] = static_cast<float>(static_cast<double>(x[d]) * row_scale);
        }
        return;
    }
    const std::int64_t whole = dim - dim % kSums;
    for (std::int64_t first = 0; first < whole; first += kSums) {
        float block[kSums];
        for (int i = 0; i < kSums; ++i) {
            block[i] = static_cast<float>(static_cast<double>(x[first + i]) * row_scale);
        }
        for (int i = 0; i < kSums; ++i) {
            values[(first + i) * stride] = block[i];
        }
    }
    for (std::int64_t d = whole; d < dim; ++d) {
        values[d * stride] = static_cast<float>(static_cast<double>(x[d]) * row_scale);
    }
}

template <typename Element>
pyfeat::TransformedRow transform_row(const void* row,
                                     double row_scale,
                                     std::int64_t dim,
                                     const pyfeat::Transform& transform,
                                     double* values) {
    const auto* x = static_cast<const Element*>(row);
    const double* mean = transform.mean;
    const double scale = transform.scale;
    PartialSums product;
    double largest[kSums] = {};
    const auto take = [&](std::int64_t d, int i) {
        const double value = (static_cast<double>(x[d]) * row_scale - mean[d]) * scale;
        values[d] = value;
        product.at[i] += value * (mean[d] * scale);
        const double magnitude = value < 0.0 ? -value : value;
        largest[i] = magnitude > largest[i] ? magnitude : largest[i];
        return value * value;
    };
    PartialSums norm;
    const std::int64_t whole = dim - dim % kSums;
    for (std::int64_t d = 0; d < whole; d += kSums) {
        for (int i = 0; i < kSums; ++i) {
            norm.at[i] += take(d + i, i);
        }
    }
    for (std::int64_t d = whole; d < dim; ++d) {
        norm.at[d - whole] += take(d, static_cast<int>(d - whole));
    }
    for (int i = 1; i < kSums; ++i) {
        largest[0] = largest[i] > largest[0] ? largest[i] : largest[0];
    }
    return {norm.total(), product.total(), largest[0]};
}

template <typename Element>
constexpr pyfeat::RowKernels row_kernels() {
    return {squared_norm<Element>,
            dot<Element>,
            squared_distance<Element>,
            transform_row<Element>,
            load_row<Element>,
            load_floats<Element>};
}

}  // namespace
