// SPDX-License-Identifier: Apache-2.0
// Powers of two of an array, and their sums over the rows and columns of tiles.
#pragma once

#include <cstring>

#include "cpu/simd/power.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/tile.hpp"

namespace {

void power_of_two(const float* exponents, std::int64_t count, float* powers) {
    for (std::int64_t i = 0; i < count; i += kLanes) {
        const auto bytes =
            static_cast<std::size_t>(count - i < kLanes ? count - i : kLanes) * sizeof(float);
        alignas(64) float block[kLanes] = {};
        std::memcpy(block, exponents + i, bytes);
        // Far below the smallest number, and finite.
        const Floats x = maximum(load(block), broadcast(-1000.0F));
        store(block, shifted(split_power(x), zero()));
        std::memcpy(powers + i, block, bytes);
    }
}

// Moves the sums of the tile's columns to the largest exponents of old and new terms. What the old
// sums must be multiplied by goes to `factors`; the new exponents are returned in `exponents`.
template <int kRows>
inline void raise_columns(const float* products,
                          float* column_exponents,
                          Floats* exponents,
                          float* factors) {
    for (int v = 0; v < kTileVectors; ++v) {
        float* at = column_exponents + v * kLanes;
        const Floats before = load(at);
        Floats largest = before;
        for (int r = 0; r < kRows; ++r) {
            largest = maximum(largest, load(products + r * kTileRows + v * kLanes));
        }
        exponents[v] = round_to_whole(largest);
        store(factors + v * kLanes,
              times_power_of_two(broadcast(1.0F), subtract(before, exponents[v])));
        store(at, exponents[v]);
    }
}

// One polynomial for each product; its mantissa serves the row's and the column's sum, which
// differ in their exponents. float32 sums of MR terms in a column, then float64; a row's lanes get
// one term from every register of the tile and are emptied by the caller before these are many.
template <int kRows>
void add_powers(const float* products, const pyfeat::PowerSums& sums) {
    Floats exponents[kTileVectors], columns[kTileVectors];
    alignas(64) float factors[kTileRows], added[kTileRows];
    raise_columns<kRows>(products, sums.column_exponents, exponents, factors);
    for (Floats& column : columns) {
        column = zero();
    }
    for (int r = 0; r < kRows; ++r) {
        Floats x[kTileVectors];
        const Floats before = load(sums.row_exponents + r * kLanes);
        Floats largest = before;
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            x[v] = load(products + r * kTileRows + v * kLanes);
            largest = maximum(largest, x[v]);
        }
        const Floats exponent = round_to_whole(largest);
        Floats row = multiply(load(sums.row_sums + r * kLanes),
                              times_power_of_two(broadcast(1.0F), subtract(before, exponent)));
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            const Power power = split_power(x[v]);
            row = add(row, shifted(power, exponent));
            columns[v] = add(columns[v], shifted(power, exponents[v]));
        }
        store(sums.row_exponents + r * kLanes, exponent);
        store(sums.row_sums + r * kLanes, row);
    }
    for (int v = 0; v < kTileVectors; ++v) {
        store(added + v * kLanes, columns[v]);
    }
    for (int c = 0; c < kTileRows; ++c) {
        sums.column_sums[c] =
            sums.column_sums[c] * static_cast<double>(factors[c]) + static_cast<double>(added[c]);
    }
}

void add_lanes(const float* exponents,
               const float* sums,
               int num_rows,
               float* row_exponents,
               double* row_sums) {
    for (int r = 0; r < num_rows; ++r) {
        const float* row = exponents + r * kLanes;
        float largest = row[0];
        for (int i = 1; i < kLanes; ++i) {
            largest = largest > row[i] ? largest : row[i];
        }
        alignas(64) float moved[kLanes];
        store(
            moved,
            multiply(load(sums + r * kLanes),
                     times_power_of_two(broadcast(1.0F), subtract(load(row), broadcast(largest)))));
        double sum = 0.0;
        for (const float lane : moved) {
            sum += static_cast<double>(lane);
        }
        row_exponents[r] = largest;
        row_sums[r] = sum;
    }
}

void copy_past_caches(const float* values, std::int64_t count, float* to) {
    for (std::int64_t i = 0; i < count; i += kLanes) {
        store_past_caches(to + i, load(values + i));
    }
}

constexpr pyfeat::PowerKernels power_kernels() {
    static_assert(kLanes <= pyfeat::kMaxLanes && kTileVectors <= 4);
    return {kLanes, power_of_two, add_lanes, copy_past_caches};
}

}  // namespace
