// SPDX-License-Identifier: Apache-2.0
// Checks of what losses over all pairs do with tiles.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "checks.hpp"
#include "cpu/similarity/schedule.hpp"

namespace {

// Pairs whose columns have the id of the row's column, and the last column, do not count.
void check_softplus(const ContrastKernels& contrast,
                    const PairTile& pairs,
                    const float* products,
                    const float* weights) {
    const TileKernels& tiles = checked.tile_kernels(contrast.precision);
    const int lanes = checked.powers.lanes;
    const double bias = -1.75 + 1e-9;
    AlignedFloats softplus(tiles.queries * lanes), sigmoids(tiles.queries * lanes);
    AlignedFloats gradient(tiles.queries * kGradientStride);
    std::fill_n(softplus.data(), tiles.queries * lanes, 0.0F);
    std::fill_n(sigmoids.data(), tiles.queries * lanes, 0.0F);
    contrast.softplus(products,
                      pairs,
                      {-1.75F, 1e-9F, tiles.rows - 1, weights},
                      {softplus.data(), sigmoids.data()},
                      gradient.data());
    const auto same = [](const float* a, const float* b) {
        return std::memcmp(a, b, sizeof(float)) == 0;
    };
    for (int r = 0; r < tiles.queries; ++r) {
        double plus = 0.0, sigmoid_sum = 0.0, found[2] = {};
        for (int c = 0; c < tiles.rows; ++c) {
            const double product = static_cast<double>(products[r * tiles.rows + c]);
            const bool out = same(pairs.row_groups + r, pairs.column_groups + c);
            const bool positive = !out && same(pairs.row_ids + r, pairs.column_ids + c);
            const double sign = positive ? -1.0 : 1.0;
            const double z = sign * (product + bias) * 0.69314718055994530942;
            const double sigmoid = sign / (1.0 + std::exp(-z));
            const bool there = c < tiles.rows - 1;
            plus += out || !there ? 0.0 : std::log1p(std::exp(z));
            sigmoid_sum += out || !there ? 0.0 : sigmoid;
            const double exact = (out ? 0.0 : sigmoid) * static_cast<double>(weights[r]);
            expect(!there || std::abs(gradient.data()[r * kGradientStride + c] - exact) <= 1e-6,
                   "gradient of softplus",
                   0,
                   c);
        }
        for (int lane = 0; lane < lanes; ++lane) {
            found[0] += static_cast<double>(softplus.data()[r * lanes + lane]);
            found[1] += static_cast<double>(sigmoids.data()[r * lanes + lane]);
        }
        expect(std::abs(found[0] - plus) <= 1e-6 * plus, "sum of softplus", 0, r);
        expect(std::abs(found[1] - sigmoid_sum) <= 1e-5, "sum of sigmoids", 0, r);
    }
}

// Every pair of rows and columns once, and no two tasks of a round with a row or a column in
// common.
void check_schedule(std::int64_t num_rows, std::int64_t num_columns, bool itself) {
    const TileKernels& tiles = checked.tile_kernels(Precision::kFloat32);
    const PairSchedule schedule(num_rows, num_columns, tiles, itself);
    std::vector<int> visits(static_cast<std::size_t>(num_rows * num_columns), 0);
    for (std::int64_t round = 0; round < schedule.num_rounds(); ++round) {
        std::vector<int> rows(static_cast<std::size_t>(num_rows), 0);
        std::vector<int> columns(static_cast<std::size_t>(num_columns), 0);
        for (const PartPair& pair : schedule.round(round)) {
            expect(pair.rows.first % tiles.queries == 0, "first row of a part", 0, num_rows);
            expect(pair.columns.first % tiles.rows == 0, "first column of a part", 0, num_rows);
            for (std::int64_t r = pair.rows.first; r < pair.rows.end; ++r) {
                ++rows[static_cast<std::size_t>(r)];
                for (std::int64_t c = pair.columns.first; c < pair.columns.end; ++c) {
                    ++visits[static_cast<std::size_t>(r * num_columns + c)];
                    if (pair.mirrored) {
                        ++visits[static_cast<std::size_t>(c * num_columns + r)];
                    }
                }
            }
            for (std::int64_t c = pair.columns.first; c < pair.columns.end; ++c) {
                ++(pair.mirrored ? rows : columns)[static_cast<std::size_t>(c)];
            }
        }
        for (const std::vector<int>* counts : {&rows, &columns}) {
            for (const int count : *counts) {
                expect(count <= 1, "a part with two tasks", 0, num_rows);
            }
        }
    }
    for (const int count : visits) {
        expect(count == 1, "visits of a pair", 0, num_rows);
    }
}

// Sums of lanes whose exponents lie far apart, one lane and then a whole row without terms; and
// copies of them.
void check_lanes(std::mt19937& random) {
    const PowerKernels& powers = checked.powers;
    constexpr int kRows = 5;
    const int lanes = powers.lanes, count = kRows * lanes;
    AlignedFloats exponents(count), sums(count), copy(count + lanes);
    std::normal_distribution<float> normal;
    for (int i = 0; i < count; ++i) {
        const bool missing = i == lanes || i / lanes == kRows - 1;
        exponents.data()[i] = missing ? kNoProduct : std::rint(300.0F * normal(random));
        sums.data()[i] = missing ? 0.0F : 1.0F + std::abs(normal(random));
    }
    float row_exponents[kRows];
    double row_sums[kRows];
    powers.add_lanes(exponents.data(), sums.data(), kRows, row_exponents, row_sums);
    for (int r = 0; r < kRows; ++r) {
        const float* row = exponents.data() + r * lanes;
        const float largest = *std::max_element(row, row + lanes);
        double sum = 0.0;
        for (int i = 0; i < lanes; ++i) {
            sum += sums.data()[r * lanes + i] *
                   std::exp2(static_cast<double>(row[i]) - static_cast<double>(largest));
        }
        expect(row_exponents[r] == largest, "exponent of lanes", 0, r);
        expect(std::abs(row_sums[r] - sum) <= 1e-7 * sum, "sum of lanes", 0, r);
    }
    std::fill_n(copy.data(), count + lanes, -1.0F);
    powers.copy_past_caches(sums.data(), count, copy.data());
    for (int i = 0; i < count + lanes; ++i) {
        expect(copy.data()[i] == (i < count ? sums.data()[i] : -1.0F), "copy", 0, i);
    }
}

// Products of features with the last rows and columns of a block of dS, two tiles high and two
// tiles wide but for one column: all rows of the sums but the last are written. Where dS is rounded
// to pairs, what is expected is rounded too.
void check_products(const ContrastKernels& contrast, std::mt19937& random) {
    const TileKernels& tiles = checked.tile_kernels(contrast.precision);
    const std::int64_t height = contrast.product_rows, width = tiles.rows;
    const std::int64_t num_rows = 2 * tiles.queries, num_columns = 2 * tiles.rows;
    const std::int64_t row = num_rows - height, column = num_columns / height * height - height;
    const std::int64_t num_features = std::max(num_rows, num_columns);
    std::normal_distribution<float> normal;
    const auto rounded = [&](float value) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        bits =
            contrast.round == nullptr ? bits : (bits + 0x7FFFU + ((bits >> 16) & 1U)) & 0xFFFF0000U;
        std::memcpy(&value, &bits, sizeof(bits));
        return value;
    };
    AlignedFloats block(kGradientRows * kGradientStride);
    AlignedFloats column_pairs(kGradientRows * kGradientStride);
    AlignedFloats row_pairs(kGradientRows * kGradientStride / 2);
    for (std::int64_t i = 0; i < num_rows * kGradientStride; ++i) {
        block.data()[i] = i % kGradientStride < num_columns - 1 ? normal(random) : 0.0F;
    }
    AlignedFloats panel(num_features * width), sums(height * width), transposed(height * width);
    std::vector<float> features(static_cast<std::size_t>(num_features * width));
    for (std::int64_t w = 0; w < num_features; ++w) {
        for (std::int64_t d = 0; d < width; ++d) {
            const float feature = rounded(normal(random));
            features[static_cast<std::size_t>(w * width + d)] = feature;
            float* word = panel.data() + w / tiles.packed_values * width + d;
            if (tiles.packed_values == 1) {
                *word = feature;
            } else {
                // Little-endian: the upper half of a float is its bfloat16.
                std::memcpy(reinterpret_cast<char*>(word) + w % 2 * 2,
                            reinterpret_cast<const char*>(&feature) + 2,
                            2);
            }
        }
    }
    for (AlignedFloats* values : {&sums, &transposed}) {
        std::fill_n(values->data(), height * width, 1.0F);
    }
    const float* by_columns = block.data();
    const float* by_rows = block.data();
    if (contrast.round != nullptr) {
        for (std::int64_t r = 0; r < num_rows; r += tiles.queries) {
            contrast.round(block.data() + r * kGradientStride,
                           r,
                           num_columns - 1,
                           column_pairs.data(),
                           row_pairs.data());
        }
        by_columns = column_pairs.data();
        by_rows = row_pairs.data();
    }
    {
        const TileUse use(tiles);
        const int written = static_cast<int>(height) - 1;
        contrast.multiply(tiles.words(num_columns - 1),
                          by_columns,
                          row,
                          panel.data(),
                          sums.data(),
                          width,
                          written);
        contrast.multiply_transposed(tiles.words(num_rows),
                                     by_rows,
                                     column,
                                     panel.data(),
                                     transposed.data(),
                                     width,
                                     written);
    }
    for (std::int64_t r = 0; r < height; ++r) {
        for (std::int64_t d = 0; d < width; ++d) {
            double plain = 1.0, turned = 1.0;
            const auto feature = [&](std::int64_t w) {
                return static_cast<double>(features[static_cast<std::size_t>(w * width + d)]);
            };
            for (std::int64_t w = 0; w < num_columns && r < height - 1; ++w) {
                plain += rounded(block.data()[(row + r) * kGradientStride + w]) * feature(w);
            }
            for (std::int64_t w = 0; w < num_rows && r < height - 1; ++w) {
                turned += rounded(block.data()[w * kGradientStride + column + r]) * feature(w);
            }
            const std::int64_t at = r * width + d;
            expect(std::abs(sums.data()[at] - plain) <= 3e-5, "product with features", 0, d);
            expect(std::abs(transposed.data()[at] - turned) <= 3e-5, "its transpose", 0, d);
        }
    }
}

void check_contrast(const ContrastKernels& contrast, std::mt19937& random) {
    const TileKernels& tiles = checked.tile_kernels(contrast.precision);
    const int num_rows = tiles.queries, num_columns = tiles.rows;
    std::normal_distribution<float> normal;
    AlignedFloats products(num_rows * num_columns), before(num_rows * num_columns);
    AlignedFloats bias(num_columns), row_ids(num_rows), column_ids(num_columns);
    AlignedFloats row_terms(3 * num_rows), column_terms(3 * num_columns + 64);
    AlignedFloats gradient(num_rows * kGradientStride);
    const auto fill = [&](AlignedFloats& values, int count, auto make) {
        for (int i = 0; i < count; ++i) {
            const auto value = make();
            std::memcpy(values.data() + i, &value, sizeof(float));
        }
    };
    const auto id = [&] { return static_cast<std::int32_t>(random() % 4); };
    const auto shift = [&] { return std::rint(normal(random)) + 4.0F; };
    fill(products, num_rows * num_columns, [&] { return normal(random); });
    std::copy_n(products.data(), num_rows * num_columns, before.data());
    fill(bias, num_columns, [&] { return normal(random); });
    fill(row_ids, num_rows, id);
    fill(column_ids, num_columns, id);
    float* rows[3];
    float* columns[3];  // on 64-byte boundaries
    for (int i = 0; i < 3; ++i) {
        rows[i] = row_terms.data() + i * num_rows;
        columns[i] = column_terms.data() + i * 32;
        for (int r = 0; r < num_rows; ++r) {
            rows[i][r] = i == 0 ? shift() : normal(random);
        }
        for (int c = 0; c < num_columns; ++c) {
            columns[i][c] = i == 0 ? shift() : normal(random);
        }
    }
    for (const bool separate : {false, true}) {
        const PairTile pairs{bias.data(),
                             row_ids.data(),
                             column_ids.data(),
                             nullptr,
                             nullptr,
                             false,
                             separate,
                             false};
        double row_sums[kMaxTileQueries] = {}, expected_sums[kMaxTileQueries] = {};
        float row_largest[kMaxTileQueries], column_largest[kMaxTileRows];
        float expected_rows[kMaxTileQueries], expected_columns[kMaxTileRows];
        for (float* largest : {row_largest, expected_rows}) {
            std::fill_n(largest, kMaxTileQueries, kNoProduct);
        }
        for (float* largest : {column_largest, expected_columns}) {
            std::fill_n(largest, kMaxTileRows, kNoProduct);
        }
        AlignedFloats tile(num_rows * num_columns);
        std::memcpy(tile.data(),
                    products.data(),
                    static_cast<std::size_t>(num_rows * num_columns) * sizeof(float));
        contrast.adjust(tile.data(), pairs, {row_sums, nullptr, row_largest, column_largest});
        contrast.gradient(products.data(),
                          pairs,
                          {rows[0], rows[1], rows[2]},
                          {columns[0], columns[1], columns[2]},
                          gradient.data());
        for (int r = 0; r < num_rows; ++r) {
            for (int c = 0; c < num_columns; ++c) {
                const float x = products.data()[r * num_columns + c] + bias.data()[c];
                const bool positive =
                    std::memcmp(row_ids.data() + r, column_ids.data() + c, sizeof(float)) == 0;
                expected_sums[r] += positive ? static_cast<double>(x) : 0.0;
                const float other = positive ? kNoProduct : x;
                expected_rows[r] = std::max(expected_rows[r], other);
                expected_columns[c] = std::max(expected_columns[c], other);
                const float kept = positive && separate ? kNoProduct : x;
                expect(tile.data()[r * num_columns + c] == kept, "adjusted product", 0, separate);
                double exact = 0.0;
                if (!positive || !separate) {
                    exact = rows[1][r] * std::exp2(static_cast<double>(x) - rows[0][r]) +
                            columns[1][c] * std::exp2(static_cast<double>(x) - columns[0][c]);
                }
                exact += positive ? static_cast<double>(rows[2][r]) + columns[2][c] : 0.0;
                expect(std::abs(gradient.data()[r * kGradientStride + c] - exact) <= 1e-5,
                       "gradient of a pair",
                       0,
                       separate);
            }
            expect(std::abs(row_sums[r] - expected_sums[r]) <= 1e-5, "positive sum", 0, separate);
            expect(row_largest[r] == expected_rows[r], "largest of a row", 0, separate);
        }
        for (int c = 0; c < num_columns; ++c) {
            expect(column_largest[c] == expected_columns[c], "largest of a column", 0, separate);
        }
    }
    check_softplus(contrast,
                   {nullptr,
                    row_ids.data(),
                    column_ids.data(),
                    column_ids.data(),
                    column_ids.data(),
                    false,
                    false,
                    false},
                   products.data(),
                   rows[1]);
    check_products(contrast, random);
    if (contrast.scale != nullptr) {
        contrast.scale(products.data(), 0.25F);
        for (int i = 0; i < num_rows * num_columns; ++i) {
            expect(products.data()[i] == 0.25F * before.data()[i], "scaled product", 0, i);
        }
    }
}

}  // namespace
