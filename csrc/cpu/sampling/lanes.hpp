// SPDX-License-Identifier: Apache-2.0
// Registers of float or double, and sums of products of rows with them. Included by sources that
// are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/simd.hpp"
#include "cpu/simd/unroll.hpp"

namespace {

template <typename Real>
struct Lanes;

template <>
struct Lanes<float> {
    using Vector = Floats;
    static constexpr int kCount = kLanes;

    static Vector zeros() {
        return zero();
    }
    static Vector all(float value) {
        return broadcast(value);
    }
    static Vector from(const float* p) {
        return load_unaligned(p);
    }
    static void to(float* p, Vector v) {
        store_unaligned(p, v);
    }
    static Vector multiply_add(Vector a, Vector b, Vector c) {
        return ::multiply_add(a, b, c);
    }
    static Vector add(Vector a, Vector b) {
        return ::add(a, b);
    }
};

// In plain C++ that compilers turn into registers.
template <>
struct Lanes<double> {
    static constexpr int kCount = 8;
    struct Vector {
        double values[kCount];
    };

    static Vector zeros() {
        return all(0.0);
    }
    static Vector all(double value) {
        Vector v;
        for (double& x : v.values) {
            x = value;
        }
        return v;
    }
    static Vector from(const double* p) {
        Vector v;
        std::memcpy(v.values, p, sizeof(v.values));
        return v;
    }
    static void to(double* p, const Vector& v) {
        std::memcpy(p, v.values, sizeof(v.values));
    }
    static Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
        Vector v;
        for (int i = 0; i < kCount; ++i) {
            v.values[i] = a.values[i] * b.values[i] + c.values[i];
        }
        return v;
    }
    static Vector add(const Vector& a, const Vector& b) {
        Vector v;
        for (int i = 0; i < kCount; ++i) {
            v.values[i] = a.values[i] + b.values[i];
        }
        return v;
    }
};

// use(feature, vectors) for blocks of `vectors` registers (a constant, at most kMost) that cover
// what whole registers cover of [first, end); returns where the rest begins.
template <typename Real, int kMost = sizeof(Real) == sizeof(float) ? 8 : 4, typename Use>
inline std::int64_t for_blocks(std::int64_t first, std::int64_t end, Use use) {
    constexpr std::int64_t kWidth = kMost * Lanes<Real>::kCount;
    for (; first + kWidth <= end; first += kWidth) {
        use(first, std::integral_constant<int, kMost>{});
    }
    if constexpr (kMost > 1) {
        return for_blocks<Real, kMost / 2>(first, end, use);
    } else {
        return first;
    }
}

}  // namespace
