// SPDX-License-Identifier: Apache-2.0
// float64 sums over features. Element d always goes to partial sum d mod 16 and the 16 are added
// in one order, and the build forbids contraction to fused multiply-add, so every instruction set
// returns the same bits. The loops are plain C++: 16 lanes map onto whatever registers there are.
#pragma once

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

double squared_norm(const float* row, std::int64_t dim) {
    return sum_over(dim, [=](std::int64_t d) {
        const double x = row[d];
        return x * x;
    });
}

double dot(const double* query, const float* row, std::int64_t dim) {
    return sum_over(dim, [=](std::int64_t d) { return query[d] * static_cast<double>(row[d]); });
}

double squared_distance(const double* query, const float* row, double row_scale, std::int64_t dim) {
    return sum_over(dim, [=](std::int64_t d) {
        const double difference = query[d] - static_cast<double>(row[d]) * row_scale;
        return difference * difference;
    });
}

pyfeat::Farthest farthest_pass(const pyfeat::Rows& rows,
                               const double* center,
                               std::int32_t pick,
                               const double* unreachable,
                               double* squared_distances,
                               std::int32_t* owners) {
    pyfeat::Farthest farthest;
    for (std::int64_t i = 0; i < rows.num_rows; ++i) {
        if (squared_distances[i] > unreachable[owners[i]]) {
            ++farthest.num_distances;
            const double distance = squared_distance(center, rows.row(i), 1.0, rows.dim);
            if (distance < squared_distances[i]) {
                squared_distances[i] = distance;
                owners[i] = pick;
            }
        }
        if (squared_distances[i] > farthest.squared_distance) {
            farthest.squared_distance = squared_distances[i];
            farthest.index = i;
        }
    }
    return farthest;
}

}  // namespace
