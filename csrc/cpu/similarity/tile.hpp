// SPDX-License-Identifier: Apache-2.0
// What is common to the tiles of every precision.
#pragma once

#include <type_traits>

#include "cpu/simd/simd.hpp"
#include "cpu/simd/unroll.hpp"
#include "cpu/similarity/distances.hpp"
#include "cpu/similarity/kernels.hpp"

namespace {

// Rows come from the second-level cache, and are there in time if they are asked for this early.
constexpr std::int64_t kWordsAhead = 16;

// thresholds[r] plus the largest error of any row of the panel, rounded up: the factors outweigh
// three roundings to float32 each. NaN, which nothing is below, for queries that are not there.
template <int kQueries>
void fill_limits(const pyfeat::Tile& tile, float* limits) {
    constexpr float kSpare = 1.0F + 0x1p-20F, kUlps = 0x1p-22F;
    const pyfeat::ErrorBounds& bounds = tile.bounds;
    for (int r = 0; r < kQueries; ++r) {
        const float error = (tile.query_norms[r] * bounds.reach +
                             tile.query_residuals[r] * bounds.norm + bounds.slack) *
                            kSpare;
        const float threshold = tile.thresholds[r];
        limits[r] = threshold + ((threshold < 0.0F ? -threshold : threshold) * kUlps + error);
    }
}

// sums [MR, NR] of one tile. A function of its own: what follows would take registers away from
// the sums. Product: `Sum`, the register of running sums; first(header), what they start from;
// accumulate(query, rows, sum), given a word of each; put(p, sum) and score(p, ...), see below.
template <typename Product>
PYFEAT_NOINLINE void multiply_panels(std::int64_t words,
                                     const float* a,
                                     const float* b,
                                     float* products) {
    using Sum = typename Product::Sum;
    Sum sums[kTileQueries][kTileVectors];
    PYFEAT_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
        PYFEAT_UNROLL
        for (int r = 0; r < kTileQueries; ++r) {
            sums[r][v] = Product::first(b + v * kLanes);
        }
    }
    b += Product::kHeaderWords * kTileRows;
    for (std::int64_t w = 0; w < words; ++w) {
        typename Product::Words rows[kTileVectors];
        for (int at = 0; at < kTileRows; at += 16) {
            PYFEAT_PREFETCH(b + kWordsAhead * kTileRows + at);
        }
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            rows[v] = Product::load_rows(b + v * kLanes);
        }
        PYFEAT_UNROLL
        for (int r = 0; r < kTileQueries; ++r) {
            const typename Product::Words query = Product::load_query(a + r);
            PYFEAT_UNROLL
            for (int v = 0; v < kTileVectors; ++v) {
                sums[r][v] = Product::accumulate(query, rows[v], sums[r][v]);
            }
        }
        a += kTileQueries;
        b += kTileRows;
    }
    PYFEAT_UNROLL
    for (int r = 0; r < kTileQueries; ++r) {
        PYFEAT_UNROLL
        for (int v = 0; v < kTileVectors; ++v) {
            Product::put(products + r * kTileRows + v * kLanes, sums[r][v]);
        }
    }
}

// The same in float32 sums of at most kSumBlock words, which are then added up: D roundings would
// cost more digits than the plain products of other libraries do.
template <typename Product>
void multiply_in_blocks(std::int64_t words, const float* a, const float* b, float* products) {
    using pyfeat::kSumBlock;
    static_assert(Product::kHeaderWords == 0, "a header would count in every block");
    multiply_panels<Product>(words < kSumBlock ? words : kSumBlock, a, b, products);
    for (std::int64_t first = kSumBlock; first < words; first += kSumBlock) {
        const std::int64_t count = words - first < kSumBlock ? words - first : kSumBlock;
        alignas(64) float block[kTileQueries * kTileRows];
        multiply_panels<Product>(count, a + first * kTileQueries, b + first * kTileRows, block);
        for (int i = 0; i < kTileQueries * kTileRows; i += kLanes) {
            store(products + i, add(load(products + i), load(block + i)));
        }
    }
}

// Turns the products of a tile into scores where there are marks; returns whether there are any.
template <typename Product, int kQueries>
bool score_products(const pyfeat::Tile& tile, float* scores, std::uint32_t* marks) {
    alignas(64) float limits[kQueries];
    fill_limits<kQueries>(tile, limits);
    Floats terms[kTileVectors], units[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
        terms[v] = load(tile.row_terms + v * kLanes);
        units[v] = load(tile.row_units + v * kLanes);
    }
    std::uint32_t any = 0;
    for (int r = 0; r < kQueries; ++r) {
        const Floats limit = broadcast(limits[r]), unit = broadcast(tile.query_units[r]);
        float* row = scores + r * kTileRows;
        Floats score[kTileVectors];
        std::uint32_t mark = 0;
        for (int v = 0; v < kTileVectors; ++v) {
            score[v] = Product::score(row + v * kLanes, terms[v], units[v], unit);
            mark |= less_or_equal(score[v], limit) << (v * kLanes);
        }
        marks[r] = mark;
        any |= mark;
        for (int v = 0; mark != 0 && v < kTileVectors; ++v) {
            store(row + v * kLanes, score[v]);
        }
    }
    return any != 0;
}

template <typename Product>
bool score_tile(const pyfeat::Tile& tile, float* scores, std::uint32_t* marks) {
    multiply_panels<Product>(tile.words, tile.query_panel, tile.row_panel, scores);
    return score_products<Product, kTileQueries>(tile, scores, marks);
}

// Where a panel keeps word `word` of its row `lane`: the words of all rows side by side, filled up
// to a multiple of kStep.
template <int kWidth, int kStepWords = 1>
struct Columns {
    static constexpr int kStep = kStepWords;

    static std::int64_t at(std::int64_t word, int lane) {
        return word * kWidth + lane;
    }
};

// Zeros from the first word that holds no feature on.
template <typename Layout>
void fill_up(std::int64_t words, float* panel, int lane) {
    for (std::int64_t word = words; word % Layout::kStep != 0; ++word) {
        panel[Layout::at(word, lane)] = 0.0F;
    }
}

// Calls block(first, count, values, rounded) for 16 features at a time, as float32, the last block
// filled up with zeros; it stores the `count` that the panel has room for and says in float64 what
// it has stored. Returns the squared difference to the exact values.
template <typename Block>
inline double round_in_blocks(const double* exact, std::int64_t dim, Block block) {
    PartialSums residual;
    // Inlined twice: a whole block has a known number of stores.
    const auto take = [&](std::int64_t first, auto count, const double* wanted) PYFEAT_INLINE {
        float values[kSums];
        double rounded[kSums];
        for (int i = 0; i < kSums; ++i) {
            values[i] = static_cast<float>(wanted[i]);
        }
        block(first, count, values, rounded);
        for (int i = 0; i < kSums; ++i) {
            const double lost = wanted[i] - rounded[i];
            residual.at[i] += lost * lost;
        }
    };
    const std::int64_t whole = dim - dim % kSums;
    for (std::int64_t first = 0; first < whole; first += kSums) {
        take(first, std::integral_constant<std::int64_t, kSums>(), exact + first);
    }
    if (whole < dim) {
        double wanted[kSums] = {};
        for (std::int64_t d = whole; d < dim; ++d) {
            wanted[d - whole] = exact[d];
        }
        take(whole, dim - whole, wanted);
    }
    return residual.total();
}

}  // namespace
