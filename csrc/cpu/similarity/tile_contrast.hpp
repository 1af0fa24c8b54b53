// SPDX-License-Identifier: Apache-2.0
// What a contrastive loss does with a tile of similarities, in powers of two.
#pragma once

#include "cpu/similarity/exponential.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/tile.hpp"
#include "cpu/similarity/tile_float32.hpp"

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

constexpr std::uint32_t kAllColumns = 0xFFFFFFFFU >> (32 - kTileRows);

// Bits of the columns of a row; `powerless` holds `left_out`.
struct PairMasks {
    std::uint32_t positive, left_out, powerless;
};

inline PairMasks masks_of(const pyfeat::PairTile& pairs, int row) {
    PairMasks masks{0, 0, 0};
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
    masks.powerless = masks.left_out;
    if (pairs.separate_positives) {
        masks.powerless |= masks.positive;
    }
    if (pairs.only_positives) {
        masks.powerless |= kAllColumns & ~masks.positive;
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

// The largest products of one row and of the columns so far, without those in `mask`.
inline void take_largest(const float* row,
                         std::uint32_t mask,
                         float* row_largest,
                         float* column_largest) {
    float values[kTileRows], largest = *row_largest;
    for (int c = 0; c < kTileRows; ++c) {
        values[c] = row[c];
    }
    for_bits(mask, [&](int c) { values[c] = pyfeat::kNoProduct; });
    for (int c = 0; c < kTileRows; ++c) {
        largest = largest > values[c] ? largest : values[c];
    }
    *row_largest = largest;
    for (int c = 0; c < kTileRows && column_largest != nullptr; ++c) {
        column_largest[c] = column_largest[c] > values[c] ? column_largest[c] : values[c];
    }
}

template <int kRows>
void adjust_tile(float* products,
                 const pyfeat::PairTile& pairs,
                 const pyfeat::ProductStatistics& statistics) {
    Floats bias[kTileVectors];
    load_bias(pairs.column_bias, bias);
    for (int r = 0; r < kRows; ++r) {
        float* row = products + r * kTileRows;
        for (int v = 0; v < kTileVectors && pairs.column_bias != nullptr; ++v) {
            store(row + v * kLanes, add(load(row + v * kLanes), bias[v]));
        }
        const PairMasks masks = masks_of(pairs, r);
        for_bits(masks.positive, [&](int c) {
            const auto product = static_cast<double>(row[c]);
            if (statistics.row_positives != nullptr) {
                statistics.row_positives[r] += product;
            }
            if (statistics.column_positives != nullptr) {
                statistics.column_positives[c] += product;
            }
        });
        if (statistics.row_largest != nullptr) {
            take_largest(row,
                         masks.positive | masks.left_out,
                         statistics.row_largest + r,
                         statistics.column_largest);
        }
        for_bits(masks.powerless, [&](int c) { row[c] = pyfeat::kNoProduct; });
    }
}

// One polynomial serves the row's and the column's power, which differ in their whole shifts.
template <int kRows>
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
    for (int r = 0; r < kRows; ++r) {
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
            const float power = (masks.powerless >> c & 1U) != 0 ? 0.0F : to[c];
            to[c] = power + rows.positives[r] +
                    (columns.shifts == nullptr ? 0.0F : columns.positives[c]);
        });
        for_bits(masks.powerless & ~masks.positive, [&](int c) { to[c] = 0.0F; });
    }
}

// ln(1 + e) for e in [0, 1]: with t = e / (2 + e) it is 2 atanh t = t p(t^2), t^2 in [0, 1/9], and
// p a minimax fit with coefficients in float32: relative error below 2^-26.9.
inline Floats log_one_plus(Floats e) {
    const Floats t = divide(e, add(broadcast(2.0F), e));
    const Floats u = multiply(t, t);
    Floats p = broadcast(0x1.208bdp-2F);
    p = multiply_add(p, u, broadcast(0x1.1e510ap-2F));
    p = multiply_add(p, u, broadcast(0x1.99dae6p-2F));
    p = multiply_add(p, u, broadcast(0x1.5554ep-1F));
    p = multiply_add(p, u, broadcast(2.0F));
    return multiply(t, p);
}

// softplus(z) = max(z, 0) + ln(1 + e) and sigmoid(z) = (e if z < 0, else 1) / (1 + e), where
// e = exp(-|z|) = 2^-|x| cannot overflow. Positive pairs have their signs turned before and after,
// so that a loss near 0 keeps its digits.
template <int kRows>
void softplus_tile(const float* products,
                   const pyfeat::PairTile& pairs,
                   const pyfeat::SoftplusTerms& terms,
                   const pyfeat::SoftplusSums& sums,
                   float* gradient) {
    constexpr float kLog2 = 0x1.62e43p-1F;
    const Floats bias = broadcast(terms.bias), rest = broadcast(terms.bias_rest);
    const std::uint32_t missing =
        terms.num_columns < kTileRows ? kAllColumns << terms.num_columns & kAllColumns : 0U;
    alignas(64) float signs[kTileRows];
    for (int v = 0; v < kTileVectors; ++v) {
        store(signs + v * kLanes, broadcast(1.0F));
    }
    for (int r = 0; r < kRows; ++r) {
        alignas(64) float row[kTileRows];
        for (int v = 0; v < kTileVectors; ++v) {
            store(row + v * kLanes, load(products + r * kTileRows + v * kLanes));
        }
        const PairMasks masks = masks_of(pairs, r);
        const std::uint32_t positive = masks.positive & ~missing;
        for_bits(positive, [&](int c) { signs[c] = -1.0F; });
        for_bits(masks.left_out | missing, [&](int c) { row[c] = pyfeat::kNoProduct; });
        float* to = gradient + r * pyfeat::kGradientStride;
        const Floats weight = broadcast(terms.weights[r]);
        Floats softplus = load(sums.softplus + r * kLanes);
        Floats sigmoids = load(sums.sigmoids + r * kLanes);
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            const Floats sign = load(signs + v * kLanes);
            const Floats x = multiply(sign, add(load(row + v * kLanes), bias));
            const Floats negated = subtract(zero(), x);
            // What the bias lost to rounding is added to the exponent, which it hardly changes.
            const Floats lost = multiply(sign, rest);
            const Floats more = if_negative(x, lost, subtract(zero(), lost));
            const Floats e = shifted(split_power(if_negative(x, x, negated), more), zero());
            const Floats one = broadcast(1.0F);
            const Floats above = maximum(add(x, lost), zero());
            softplus = add(softplus, multiply_add(above, broadcast(kLog2), log_one_plus(e)));
            const Floats sigmoid = multiply(sign, divide(if_negative(x, e, one), add(one, e)));
            sigmoids = add(sigmoids, sigmoid);
            store(to + v * kLanes, multiply(weight, sigmoid));
        }
        store(sums.softplus + r * kLanes, softplus);
        store(sums.sigmoids + r * kLanes, sigmoids);
        for_bits(positive, [&](int c) { signs[c] = 1.0F; });
    }
}

// sums[r, d] += gradient[(first + r) * kRowStride + w * kWordStride] panel[w, d], words of Product.
template <typename Product, std::int64_t kRowStride, std::int64_t kWordStride>
PYFEAT_NOINLINE void multiply_gradient(std::int64_t words,
                                       const float* gradient,
                                       std::int64_t first,
                                       const float* panel,
                                       float* sums,
                                       std::int64_t stride,
                                       int rows) {
    // The sums of a whole gradient do not fit the second-level cache: asked for now, they are there
    // when the products are.
    for (int r = 0; r < rows; ++r) {
        for (int at = 0; at < kTileRows; at += 16) {
            PYFEAT_PREFETCH(sums + r * stride + at);
        }
    }
    Floats sum[kTileQueries][kTileVectors];
    PYFEAT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
        PYFEAT_UNROLL
        for (int r = 0; r < kTileQueries; ++r) {
            sum[r][v] = zero();
        }
    }
    gradient += first * kRowStride;
    for (std::int64_t w = 0; w < words; ++w) {
        typename Product::Words values[kTileVectors];
        for (int at = 0; at < kTileRows; at += 16) {
            PYFEAT_PREFETCH(panel + kWordsAhead * kTileRows + at);
        }
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            values[v] = Product::load_rows(panel + v * kLanes);
        }
        PYFEAT_UNROLL
        for (int r = 0; r < kTileQueries; ++r) {
            const typename Product::Words factor = Product::load_query(gradient + r * kRowStride);
            PYFEAT_UNROLL
            for (int v = 0; v < kTileVectors; ++v) {
                sum[r][v] = Product::accumulate(factor, values[v], sum[r][v]);
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

constexpr pyfeat::ContrastKernels float32_contrast() {
    return {pyfeat::Precision::kFloat32,
            kTileQueries,
            nullptr,
            add_powers<kTileQueries>,
            adjust_tile<kTileQueries>,
            gradient_tile<kTileQueries>,
            softplus_tile<kTileQueries>,
            nullptr,
            multiply_gradient<Float32Product, pyfeat::kGradientStride, 1>,
            multiply_gradient<Float32Product, 1, pyfeat::kGradientStride>};
}

}  // namespace
