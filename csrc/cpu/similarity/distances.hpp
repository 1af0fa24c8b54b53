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

inline void prefetch(const float* row, std::int64_t dim) {
#if defined(__GNUC__)
    constexpr std::int64_t kLine = 16;  // floats
    for (std::int64_t d = 0; d < dim; d += kLine) {
        __builtin_prefetch(row + d);
    }
#else
    (void)row;
    (void)dim;
#endif
}

pyfeat::Farthest farthest_pass(const pyfeat::Rows& rows,
                               const double* center,
                               std::int32_t pick,
                               const double* unreachable,
                               double* squared_distances,
                               std::int32_t* owners) {
    // A block at a time: list the rows to look at, look at them, find the largest. Three loops that
    // the processor can run ahead in, where one would mispredict every other row.
    constexpr std::int64_t kBlock = 512;
    constexpr std::int64_t kAhead = 3;  // rows fetched before they are needed
    std::int32_t listed[kBlock + kAhead];
    pyfeat::Farthest farthest;
    for (std::int64_t first = 0; first < rows.num_rows; first += kBlock) {
        const std::int64_t count = rows.num_rows - first < kBlock ? rows.num_rows - first : kBlock;
        double* squared = squared_distances + first;
        std::int32_t* owner = owners + first;
        std::int64_t num_listed = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            listed[num_listed] = static_cast<std::int32_t>(i);
            num_listed += squared[i] > unreachable[owner[i]] ? 1 : 0;
        }
        for (std::int64_t i = num_listed; i < num_listed + kAhead; ++i) {
            listed[i] = 0;
        }
        const bool scattered = 2 * num_listed < count;  // else the processor guesses the next row
        for (std::int64_t i = 0; i < num_listed; ++i) {
            if (scattered) {
                prefetch(rows.row(first + listed[i + kAhead]), rows.dim);
            }
            const std::int64_t at = listed[i];
            const double distance = squared_distance(center, rows.row(first + at), 1.0, rows.dim);
            if (distance < squared[at]) {
                squared[at] = distance;
                owner[at] = pick;
            }
        }
        for (std::int64_t i = 0; i < count; ++i) {
            if (squared[i] > farthest.squared_distance) {
                farthest.squared_distance = squared[i];
                farthest.index = first + i;
            }
        }
        farthest.num_distances += num_listed;
    }
    return farthest;
}

}  // namespace
