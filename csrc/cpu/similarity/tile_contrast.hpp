// SPDX-License-Identifier: Apache-2.0
// What a contrastive loss does with a tile of similarities, in powers of two.
#pragma once

#include "cpu/similarity/exponential.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/tile.hpp"

namespace {

// Bit c says that column c has the same id.
inline std::uint32_t columns_like(const float* row_id, const float* column_ids) {
    const Ints id = broadcast_word(row_id);
    std::uint32_t mask = 0;
    for (int v = 0; v < kTileVectors; ++v) {
        mask |= equal(id, load_ints(column_ids + v * kLanes)) << (v * kLanes);
    }
    return mask;
}

struct PairMasks {
    std::uint32_t positive, left_out;
};

inline PairMasks masks_of(const pyfeat::PairTile& pairs, int row) {
    PairMasks masks{0, 0};
    if (pairs.row_ids != nullptr) {
        masks.positive = columns_like(pairs.row_ids + row, pairs.column_ids);
    }
    if (pairs.row_groups != nullptr) {
        masks.left_out = columns_like(pairs.row_groups + row, pairs.column_groups);
        if (pairs.keep_positives) {
            masks.left_out &= ~masks.positive;
        } else {
            masks.positive &= ~masks.left_out;
        }
    }
    return masks;
}

// use(column) for every bit that is set.
template <typename Use>
inline void for_bits(std::uint32_t mask, Use use) {
    for (int c = 0; mask != 0; mask >>= 1, ++c) {
        if ((mask & 1U) != 0) {
            use(c);
        }
    }
}

inline void load_bias(const float* bias, Floats* values) {
    for (int v = 0; v < kTileVectors; ++v) {
        values[v] = bias == nullptr ? zero() : load(bias + v * kLanes);
    }
}

void adjust_tile(float* products, const pyfeat::PairTile& pairs, const pyfeat::PositiveSums& sums) {
    Floats bias[kTileVectors];
    load_bias(pairs.column_bias, bias);
    for (int r = 0; r < kTileQueries; ++r) {
        float* row = products + r * kTileRows;
        for (int v = 0; v < kTileVectors && pairs.column_bias != nullptr; ++v) {
            store(row + v * kLanes, add(load(row + v * kLanes), bias[v]));
        }
        const PairMasks masks = masks_of(pairs, r);
        for_bits(masks.positive, [&](int c) {
            const auto product = static_cast<double>(row[c]);
            if (sums.rows != nullptr) {
                sums.rows[r] += product;
            }
            if (sums.columns != nullptr) {
                sums.columns[c] += product;
            }
        });
        const std::uint32_t powerless =
            masks.left_out | (pairs.separate_positives ? masks.positive : 0);
        for_bits(powerless, [&](int c) { row[c] = pyfeat::kNoProduct; });
    }
}

// One polynomial serves the row's and the column's power, which differ in their whole shifts.
void gradient_tile(const float* products,
                   const pyfeat::PairTile& pairs,
                   const pyfeat::GradientTerms& rows,
                   const pyfeat::GradientTerms& columns,
                   float* gradient) {
    Floats bias[kTileVectors], shifts[kTileVectors], weights[kTileVectors];
    load_bias(pairs.column_bias, bias);
    for (int v = 0; v < kTileVectors; ++v) {
        shifts[v] = columns.shifts == nullptr ? zero() : load(columns.shifts + v * kLanes);
        weights[v] = columns.shifts == nullptr ? zero() : load(columns.weights + v * kLanes);
    }
    for (int r = 0; r < kTileQueries; ++r) {
        float* to = gradient + r * pyfeat::kGradientStride;
        const Floats shift = broadcast(rows.shifts[r]), weight = broadcast(rows.weights[r]);
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            const Floats x = add(load(products + r * kTileRows + v * kLanes), bias[v]);
            const Power power = split_power(x);
            Floats sum = multiply(weight, shifted(power, shift));
            if (columns.shifts != nullptr) {
                sum = multiply_add(weights[v], shifted(power, shifts[v]), sum);
            }
            store(to + v * kLanes, sum);
        }
        const PairMasks masks = masks_of(pairs, r);
        for_bits(masks.positive, [&](int c) {
            const float power = pairs.separate_positives ? 0.0F : to[c];
            to[c] = power + rows.positives[r] +
                    (columns.shifts == nullptr ? 0.0F : columns.positives[c]);
        });
        for_bits(masks.left_out, [&](int c) { to[c] = 0.0F; });
    }
}

// sums[r, d] += gradient[r * kRowStride + w * kWordStride] panel[w, d].
template <std::int64_t kRowStride, std::int64_t kWordStride>
PYFEAT_NOINLINE void multiply_gradient(std::int64_t count,
                                       const float* gradient,
                                       const float* panel,
                                       float* sums,
                                       std::int64_t stride,
                                       int rows) {
    Floats sum[kTileQueries][kTileVectors];
    PYFEAT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
        PYFEAT_UNROLL
        for (int r = 0; r < kTileQueries; ++r) {
            sum[r][v] = zero();
        }
    }
    for (std::int64_t w = 0; w < count; ++w) {
        Floats values[kTileVectors];
        for (int at = 0; at < kTileRows; at += 16) {
            PYFEAT_PREFETCH(panel + kWordsAhead * kTileRows + at);
        }
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            values[v] = load(panel + v * kLanes);
        }
        PYFEAT_UNROLL
        for (int r = 0; r < kTileQueries; ++r) {
            const Floats factor = broadcast(gradient[r * kRowStride]);
            PYFEAT_UNROLL
            for (int v = 0; v < kTileVectors; ++v) {
                sum[r][v] = multiply_add(factor, values[v], sum[r][v]);
            }
        }
        gradient += kWordStride;
        panel += kTileRows;
    }
    PYFEAT_UNROLL
    for (int r = 0; r < kTileQueries; ++r) {
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            float* at = sums + r * stride + v * kLanes;
            if (r < rows) {
                store(at, add(load(at), sum[r][v]));
            }
        }
    }
}

constexpr pyfeat::ContrastKernels contrast_kernels() {
    return {adjust_tile,
            gradient_tile,
            multiply_gradient<pyfeat::kGradientStride, 1>,
            multiply_gradient<1, pyfeat::kGradientStride>};
}

}  // namespace
