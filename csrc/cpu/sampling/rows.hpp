// SPDX-License-Identifier: Apache-2.0
// Sums over the rows of the corners of all points, in registers. Arrays over the corners are corner
// by corner, each of `slots` of which the first `points` count. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/sampling/lanes.hpp"

namespace {

struct CornerCounts {
    int corners;
    std::int64_t points, slots;
};

// output[d] (+)= sum of factors * rows[.][d]
template <typename Real>
void add_rows(const CornerCounts& counts,
              const Real* factors,
              const Real* const* rows,
              std::int64_t dim,
              bool add_to,
              Real* output) {
    using L = Lanes<Real>;
    const std::int64_t rest = for_blocks<Real>(0, dim, [&](std::int64_t first, auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        // A sum waits for the one before it: with few registers a block has two sums for each.
        constexpr int kSums = kVectors > 4 ? 1 : 2;
        typename L::Vector sums[kSums][kVectors];
        PYFEAT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            PYFEAT_UNROLL
            for (int s = 0; s < kSums; ++s) {
                sums[s][v] = L::zeros();
            }
        }
        const auto add = [&](std::int64_t i, int s) {
            const typename L::Vector factor = L::all(factors[i]);
            const Real* row = rows[i] + first;
            PYFEAT_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                sums[s][v] = L::multiply_add(factor, L::from(row + v * L::kCount), sums[s][v]);
            }
        };
        for (int e = 0; e < counts.corners; ++e) {
            const std::int64_t end = e * counts.slots + counts.points;
            std::int64_t i = e * counts.slots;
            for (; i + kSums <= end; i += kSums) {
                PYFEAT_UNROLL
                for (int s = 0; s < kSums; ++s) {
                    add(i + s, s);
                }
            }
            for (; i < end; ++i) {
                add(i, 0);
            }
        }
        PYFEAT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            typename L::Vector sum = sums[0][v];
            if constexpr (kSums == 2) {
                sum = L::add(sum, sums[1][v]);
            }
            Real* at = output + first + v * L::kCount;
            L::to(at, add_to ? L::add(L::from(at), sum) : sum);
        }
    });
    for (std::int64_t d = rest; d < dim; ++d) {
        Real sum = add_to ? output[d] : Real{0};
        for (int e = 0; e < counts.corners; ++e) {
            for (std::int64_t i = e * counts.slots; i < e * counts.slots + counts.points; ++i) {
                sum += factors[i] * rows[i][d];
            }
        }
        output[d] = sum;
    }
}

// rows[.][d] += factors * feature[d] for d in [first, end)
template <typename Real>
void add_to_rows(const CornerCounts& counts,
                 const Real* factors,
                 Real* const* rows,
                 const Real* feature,
                 std::int64_t first,
                 std::int64_t end) {
    using L = Lanes<Real>;
    const auto for_rows = [&](auto use) {
        for (int e = 0; e < counts.corners; ++e) {
            for (std::int64_t i = e * counts.slots; i < e * counts.slots + counts.points; ++i) {
                use(factors[i], rows[i]);
            }
        }
    };
    const std::int64_t rest = for_blocks<Real>(first, end, [&](std::int64_t at, auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        typename L::Vector part[kVectors];
        PYFEAT_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            part[v] = L::from(feature + at + v * L::kCount);
        }
        for_rows([&](Real factor, Real* row) {
            const typename L::Vector by = L::all(factor);
            PYFEAT_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                Real* to = row + at + v * L::kCount;
                L::to(to, L::multiply_add(by, part[v], L::from(to)));
            }
        });
    });
    for_rows([&](Real factor, Real* row) {
        for (std::int64_t d = rest; d < end; ++d) {
            row[d] += factor * feature[d];
        }
    });
}

// dots[.] = sum over d of rows[.][d] feature[d], of all slots: those without a point have rows as
// well. As many rows at a time as a register has lanes, whose sums over the lanes are then taken at
// once: each costs three instructions, less than the fewer but longer sums of the value and of its
// n derivatives.
inline void dot_rows(const CornerCounts& counts,
                     const float* const* rows,
                     const float* feature,
                     std::int64_t dim,
                     float* dots) {
    const std::int64_t whole = dim / kLanes * kLanes;
    for (std::int64_t i = 0; i < counts.corners * counts.slots; i += kLanes) {
        const float* const* group = rows + i;
        Floats sums[kLanes];
        PYFEAT_UNROLL
        for (int k = 0; k < kLanes; ++k) {
            sums[k] = zero();
        }
        for_blocks<float, 4>(0, whole, [&](std::int64_t first, auto vectors) {
            constexpr int kVectors = decltype(vectors)::value;
            Floats part[kVectors];
            PYFEAT_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                part[v] = load_unaligned(feature + first + v * kLanes);
            }
            PYFEAT_UNROLL
            for (int k = 0; k < kLanes; ++k) {
                const float* row = group[k] + first;
                PYFEAT_UNROLL
                for (int v = 0; v < kVectors; ++v) {
                    sums[k] = multiply_add(part[v], load_unaligned(row + v * kLanes), sums[k]);
                }
            }
        });
        store_unaligned(dots + i, sums_of_registers(sums));
        for (int k = 0; k < kLanes && whole < dim; ++k) {
            for (std::int64_t d = whole; d < dim; ++d) {
                dots[i + k] += group[k][d] * feature[d];
            }
        }
    }
}

inline void dot_rows(const CornerCounts& counts,
                     const double* const* rows,
                     const double* feature,
                     std::int64_t dim,
                     double* dots) {
    for (std::int64_t i = 0; i < counts.corners * counts.slots; ++i) {
        double sum = 0.0;
        for (std::int64_t d = 0; d < dim; ++d) {
            sum += rows[i][d] * feature[d];
        }
        dots[i] = sum;
    }
}

}  // namespace
