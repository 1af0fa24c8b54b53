// SPDX-License-Identifier: Apache-2.0
// Sums of exponentials that cannot overflow, added up in the same order by any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/similarity/products.hpp"
#include "cpu/threads.hpp"

namespace pyfeat {

// A sweep is cut into this many parts or a few more: enough for the threads of a large machine, and
// few enough for every part to have column sums of its own.
constexpr std::int64_t kParts = 64;

inline std::size_t to_size(std::int64_t value) {
    return static_cast<std::size_t>(value);
}

// What tiles compute: S / ln 2, and powers of two with whole exponents.
struct Base2 {
    static constexpr double kLog = 0.69314718055994530942;  // of the base

    // 2^exponent for whole exponents up to 0; 0 below the normal numbers.
    static double power(double exponent) {
        if (!(exponent >= -1022.0)) {
            return 0.0;
        }
        const std::int64_t bits = (1023 + static_cast<std::int64_t>(exponent)) << 52;
        double value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
    }
};

struct BaseE {
    static constexpr double kLog = 1.0;

    static double power(double exponent) {
        return std::exp(exponent);
    }
};

// sum * base^exponent, the exponent being that of the largest term so far.
template <typename Base>
struct ShiftedSum {
    double exponent = -std::numeric_limits<double>::infinity();
    double sum = 0.0;

    void add(double other_exponent, double other_sum) {
        if (other_exponent > exponent) {
            sum = sum * Base::power(exponent - other_exponent) + other_sum;
            exponent = other_exponent;
        } else if (other_sum > 0.0) {
            sum += other_sum * Base::power(other_exponent - exponent);
        }
    }
    void add(const ShiftedSum& other) {
        add(other.exponent, other.sum);
    }
    double log() const {
        return sum > 0.0 ? exponent * Base::kLog + std::log(sum)
                         : -std::numeric_limits<double>::infinity();
    }
};

// A sweep over ranges of A and B in a fixed number of parts. Row sums of a range exist once for
// every part of B, column sums of a chunk once for every part of A; they are added in that order.
struct Parts {
    std::int64_t a, b;  // panels, or rows, that are never cut
    std::int64_t num_a, num_b;

    Parts(std::int64_t a, std::int64_t b)
        : a(a),
          b(b),
          num_a(std::min(a, kParts)),
          num_b(std::min(b, (kParts + num_a - 1) / num_a)) {}

    // Calls body(part of A, part of B, range of A, range of B) for every pair.
    template <typename Body>
    void run(Execution& execution, Body body) const {
        execution.parallel_for(num_a * num_b, [&](std::int64_t task, int) {
            const std::int64_t i = task / num_b, j = task % num_b;
            body(i,
                 j,
                 PanelRange{a * i / num_a, a * (i + 1) / num_a},
                 PanelRange{b * j / num_b, b * (j + 1) / num_b});
        });
    }
};

// totals[i] += part(p, i) for every part p in turn.
template <typename Base, typename Part>
void merge(std::int64_t num_parts,
           std::int64_t count,
           ShiftedSum<Base>* totals,
           Execution& execution,
           Part part) {
    constexpr std::int64_t kPerTask = 1024;
    execution.parallel_for((count + kPerTask - 1) / kPerTask, [&](std::int64_t task, int) {
        const std::int64_t end = std::min(count, (task + 1) * kPerTask);
        for (std::int64_t p = 0; p < num_parts; ++p) {
            for (std::int64_t i = task * kPerTask; i < end; ++i) {
                totals[i].add(part(p, i));
            }
        }
    });
}

}  // namespace pyfeat
