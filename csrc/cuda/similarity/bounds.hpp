// SPDX-License-Identifier: Apache-2.0
// Between which bounds the score of a query and a row lies when their product is one of packed
// values.
//
// The score of row x for query q is h - q.x, the less the nearer, of transformed rows (frame): h =
// ||x||^2 / 2, or -m.x for the inner product with m the mean. u = 2^-24; x^ and q^ are what is
// packed in bfloat16.
//
// - packing: ||x - x^|| and ||q - q^|| are measured in float64. The product may treat subnormal
// values
//   as zero, at most sqrt(D) tiny more, tiny = 2^-126.
// - product: products of bfloat16 are exact in float32. A tensor core adds some of them (at least
// 4) to
//   the running sum at once: it aligns all terms with the largest and may cut off what lies below
//   the last bit of a float32 of that size, so that each term loses at most 2^-23 of the largest
//   magnitude in sight, which sum |q_d x_d| bounds; so does the one rounding of each such sum.
//   These are at most D + 2 D / 4 < 2 D losses in any order of the terms, rounded or truncated: |p
//   - q^.x^| <= g ||q^|| ||x^|| + D tiny, g = 4 D u / (1 - 4 D u).
// - row term: h, rounded once: u |h| + tiny.
// - score: fl(h - p): u (|h| + |p|), and as much again, and a little, for adding the bound to it;
//   |p| <= (1 + g) ||q^|| ||x^||.
//
// With |q.x - q^.x^| <= ||q - q^|| ||x|| + ||q^|| ||x - x^|| the sum is at most
//   ||q|| (||x - x^|| + (g + 5u) ||x||) + ||q - q^|| ||x|| + 4u |h| + (D + 2) tiny (1 + ||q||),
// where ||q|| stands for the larger of ||q|| and ||q^||, and so for x.
//
// Brute force in float64 rounds, too: distances that differ by less than that may come out equal,
// and then the lower index wins, so such rows must not be dropped. Its error is at most D + 4 units
// 2^-53 of the squared distance, which (||q|| + ||x||)^2 bounds, or of sum |q_d x_d| for the inner
// product, which (||q|| + m + ||x||)^2 bounds with m the norm of the mean. Either is at most 2
// (||q|| + m)^2 + 2 ||x||^2: one part goes to the query, one to the row. The same term covers the
// float64 sums here.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.hpp"

namespace pyfeat::cuda {

constexpr double kUnit = 0x1p-24;
constexpr double kTiny = 0x1p-126;
// Rows larger than this in the frame's units have no bound, so that they stay in. Below it nothing
// overflows: products stay under 2^125, row terms under 2^108.
constexpr double kLargestNorm = 0x1p54;
constexpr double kLargestScore = 0x1p108;
// For the rounding of the bounds themselves, also when they are stored as float32.
constexpr double kSpare = 1.0 + 0x1p-20;

PYFEAT_HOST_DEVICE inline float infinity() {
    return static_cast<float>(HUGE_VAL);
}
PYFEAT_HOST_DEVICE inline float nan_value() {
    return infinity() - infinity();
}

// What is summed over the features of one transformed row x and its packed form x^.
struct PackedSums {
    double residual;      // ||x - x^||^2
    double squared;       // ||x||^2
    double mean_product;  // m.x
};

// Of a row of memory, or the largest of several: 16 bytes.
struct alignas(16) RowTerms {
    float score;  // h; infinite for a row that is not there
    float reach, norm, slack;
};

// Of a query: 16 bytes. The norm is NaN for a query that finds nothing.
struct alignas(16) QueryTerms {
    float norm, residual, slack, unused;
};

// Bounds on ||x - x^|| and on ||x|| and ||x^||.
struct Norms {
    double residual, norm;
};
PYFEAT_HOST_DEVICE inline Norms norms_of(const PackedSums& sums, double dim) {
    const double residual = (std::sqrt(sums.residual) + std::sqrt(dim) * kTiny) * kSpare;
    return {residual, (std::sqrt(sums.squared) + residual) * kSpare};
}

// This row's part of what brute force in float64 may be off by, in units of the score.
PYFEAT_HOST_DEVICE inline double float64_noise(double norm, double dim) {
    return 2.0 * (dim + 16.0) * 0x1p-51 * norm * norm;
}

// `score` is h in float64.
PYFEAT_HOST_DEVICE inline RowTerms row_terms(const PackedSums& sums, double score, double dim) {
    const Norms norms = norms_of(sums, dim);
    const double magnitude = std::fabs(score);
    if (!(norms.norm <= kLargestNorm && magnitude <= kLargestScore)) {
        return {0.0F, infinity(), infinity(), infinity()};
    }
    const double losses = 4.0 * dim * kUnit, underflow = (dim + 8.0) * kTiny;
    const double lost = losses / (1.0 - losses) + 5.0 * kUnit;
    const double reach = norms.residual + lost * norms.norm + underflow;
    const double slack = 4.0 * kUnit * magnitude + float64_noise(norms.norm, dim) + underflow;
    return {static_cast<float>(score),
            static_cast<float>(reach * kSpare),
            static_cast<float>(norms.norm * kSpare + kTiny),
            static_cast<float>(slack * kSpare)};
}

// `shift` is m, 0 but for the inner product.
PYFEAT_HOST_DEVICE inline QueryTerms query_terms(const PackedSums& sums, double shift, double dim) {
    const Norms norms = norms_of(sums, dim);
    if (!(norms.norm <= kLargestNorm)) {
        return {infinity(), infinity(), 0.0F, 0.0F};
    }
    return {static_cast<float>(norms.norm * kSpare + kTiny),
            static_cast<float>(norms.residual * kSpare + kTiny),
            static_cast<float>(float64_noise(norms.norm + shift, dim) * kSpare + kTiny),
            0.0F};
}

// Of a score, on either side. It grows with each term of the row, so that the largest terms of
// several rows bound the errors of all. `spare` is kSpare, for this arithmetic.
PYFEAT_HOST_DEVICE inline float score_error(const QueryTerms& query,
                                            const RowTerms& row,
                                            float spare) {
    const float slack = query.slack + row.slack;
    return std::fma(query.norm, row.reach, std::fma(query.residual, row.norm, slack)) * spare;
}

// Whole numbers in the order of the floats, and back.
PYFEAT_HOST_DEVICE inline std::int32_t flip_negative(std::int32_t bits) {
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

}  // namespace pyfeat::cuda
