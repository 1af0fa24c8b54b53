// SPDX-License-Identifier: Apache-2.0
// What a contrastive loss does with a tile of bfloat16 features, where an instruction multiplies
// pairs of them: dS is rounded to pairs too, and multiplied with features in float32 sums.
#pragma once

#include "cpu/similarity/tile_bf16.hpp"
#include "cpu/similarity/tile_contrast.hpp"
#if defined(PYFEAT_ISA_AMX)
#include "cpu/similarity/tile_matrix.hpp"
#endif

namespace {

template <int kRows>
void scale_tile(float* products, float factor) {
    const Floats by = broadcast(factor);
    for (int i = 0; i < kRows * kTileRows; i += kLanes) {
        store(products + i, multiply(load(products + i), by));
    }
}

// Pairs of columns in two rows of a tile, rounded to nearest, and pairs of these rows in 16 columns
// each.
struct RoundedPairs {
    Ints columns[2], rows[2];
};

inline RoundedPairs round_pairs(const float* gradient) {
    static_assert(kTileRows == 2 * kLanes);
    RoundedPairs pairs;
    for (int i = 0; i < 2; ++i) {
        const float* row = gradient + i * pyfeat::kGradientStride;
        pairs.columns[i] =
            reinterpret_cast<Ints>(_mm512_cvtne2ps_pbh(load(row + kLanes), load(row)));
    }
    const auto interleave = [](__m256i low, __m256i high) {
        return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    };
    pairs.rows[0] = interleave(_mm512_castsi512_si256(pairs.columns[0]),
                               _mm512_castsi512_si256(pairs.columns[1]));
    pairs.rows[1] = interleave(_mm512_extracti64x4_epi64(pairs.columns[0], 1),
                               _mm512_extracti64x4_epi64(pairs.columns[1], 1));
    return pairs;
}

template <int kRows>
constexpr pyfeat::ContrastKernels bf16_contrast_kernels(
    int product_rows,
    decltype(pyfeat::ContrastKernels::round) round,
    decltype(pyfeat::ContrastKernels::multiply) multiply,
    decltype(pyfeat::ContrastKernels::multiply) multiply_transposed) {
    return {pyfeat::Precision::kBfloat16,
            product_rows,
            scale_tile<kRows>,
            add_powers<kRows>,
            adjust_tile<kRows>,
            gradient_tile<kRows>,
            softplus_tile<kRows>,
            round,
            multiply,
            multiply_transposed};
}

#if defined(PYFEAT_ISA_AMX)

// Panels of queries of kMatrixQueries rows, and of as many columns.
constexpr std::int64_t kRowsPanel = kMatrixQueries * pyfeat::kGradientColumns / 2;
constexpr std::int64_t kColumnsPanel = kMatrixQueries * pyfeat::kGradientRows / 2;

void round_to_panels(const float* gradient,
                     std::int64_t row,
                     std::int64_t num_columns,
                     float* column_pairs,
                     float* row_pairs) {
    static_assert(kMatrixQueries == 2 * kUnitWords && kMatrixRows == 2 * kUnitWords);
    static_assert(pyfeat::kGradientRows % kMatrixQueries == 0);
    static_assert(pyfeat::kGradientColumns % kMatrixQueries == 0);
    const Ints lanes =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32(kUnitWords));
    float* by_columns = column_pairs + row / kMatrixQueries * kRowsPanel;
    for (std::int64_t c = 0; c < num_columns; c += kTileRows) {
        float* by_rows = row_pairs + c / kMatrixQueries * kColumnsPanel;
        for (int r = 0; r < kMatrixQueries; r += 2) {
            const RoundedPairs pairs = round_pairs(gradient + r * pyfeat::kGradientStride + c);
            for (int i = 0; i < 2; ++i) {
                store_ints(by_columns + MatrixRows::at(c / 2, r + i), pairs.columns[i]);
                _mm512_i32scatter_epi32(
                    by_rows + MatrixRows::at((row + r) / 2, i * kLanes), lanes, pairs.rows[i], 4);
            }
        }
    }
}

template <std::int64_t kPanel>
void multiply_gradient_panels(std::int64_t words,
                              const float* gradient,
                              std::int64_t first,
                              const float* panel,
                              float* sums,
                              std::int64_t stride,
                              int rows) {
    alignas(64) float products[kMatrixQueries * kMatrixRows];
    Bfloat16Matrix::multiply(words, gradient + first / kMatrixQueries * kPanel, panel, products);
    for (int r = 0; r < rows; ++r) {
        for (int d = 0; d < kMatrixRows; d += kLanes) {
            float* at = sums + r * stride + d;
            store(at, add(load(at), load(products + r * kMatrixRows + d)));
        }
    }
}

constexpr pyfeat::ContrastKernels bf16_contrast() {
    return bf16_contrast_kernels<kMatrixQueries>(kMatrixQueries,
                                                 round_to_panels,
                                                 multiply_gradient_panels<kRowsPanel>,
                                                 multiply_gradient_panels<kColumnsPanel>);
}

#else

// Rows of words as they are in the block: [rows, columns / 2] and [rows / 2, columns], both of
// stride kGradientStride.
void round_to_rows(const float* gradient,
                   std::int64_t row,
                   std::int64_t num_columns,
                   float* column_pairs,
                   float* row_pairs) {
    static_assert(kTileQueries % 2 == 0);
    for (int r = 0; r < kTileQueries; r += 2) {
        float* by_columns = column_pairs + (row + r) * pyfeat::kGradientStride;
        float* by_rows = row_pairs + (row + r) / 2 * pyfeat::kGradientStride;
        for (std::int64_t c = 0; c < num_columns; c += kTileRows) {
            const RoundedPairs pairs = round_pairs(gradient + r * pyfeat::kGradientStride + c);
            for (int i = 0; i < 2; ++i) {
                store_ints(by_columns + i * pyfeat::kGradientStride + c / 2, pairs.columns[i]);
                store_ints(by_rows + c + i * kLanes, pairs.rows[i]);
            }
        }
    }
}

constexpr pyfeat::ContrastKernels bf16_contrast() {
    return bf16_contrast_kernels<kTileQueries>(
        kTileQueries,
        round_to_rows,
        multiply_gradient<Bfloat16Product, pyfeat::kGradientStride, 1>,
        multiply_gradient<Bfloat16Product, 1, pyfeat::kGradientStride>);
}

#endif

}  // namespace
