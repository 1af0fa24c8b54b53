// SPDX-License-Identifier: Apache-2.0
// bfloat16 tiles: panels [(D + 1) / 2, width] of pairs, features 2 i and 2 i + 1 in one word.
// One instruction multiplies both and adds them to a float32 sum: twice the rate of float32.
#pragma once

#include <cstring>

#include "cpu/similarity/tile.hpp"

namespace {

constexpr int kPackedValues = 2;

inline __m512bh as_pairs(__m512 words) {
    return reinterpret_cast<__m512bh>(words);
}

// Products of bfloat16 are exact in float32, so every feature costs one rounding, as in float32
// tiles. The instruction flushes subnormal numbers; the error bound allows for that.
void tile_product(std::int64_t dim, const float* a, const float* b, float* products) {
    Floats sums[kTileQueries][kTileVectors];
    clear(sums);
    const std::int64_t words = (dim + 1) / 2;
    for (std::int64_t w = 0; w < words; ++w) {
        __m512bh rows[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) {
            rows[v] = as_pairs(load(b + v * kLanes));
        }
        for (int r = 0; r < kTileQueries; ++r) {
            const __m512bh query = as_pairs(broadcast(a[r]));
            for (int v = 0; v < kTileVectors; ++v) {
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], query, rows[v]);
            }
        }
        a += kTileQueries;
        b += kTileRows;
    }
    store(products, sums);
}

pyfeat::PackedRow pack_row(const float* row,
                           double row_scale,
                           std::int64_t dim,
                           const pyfeat::Transform& transform,
                           float* panel,
                           int width,
                           int lane) {
    auto* halves = reinterpret_cast<char*>(panel);
    const auto put = [=](std::int64_t d, std::uint16_t bits) {
        std::memcpy(halves + 4 * ((d / 2) * width + lane) + 2 * (d % 2), &bits, sizeof(bits));
    };
    if (dim % 2 != 0) {
        put(dim, 0);
    }
    return transform_row(row, row_scale, dim, transform, [=](std::int64_t d, float x) {
        std::uint32_t word = 0;
        std::memcpy(&word, &x, sizeof(word));
        word += 0x7FFFU + ((word >> 16) & 1U);  // to nearest, ties to even
        word &= 0xFFFF0000U;
        put(d, static_cast<std::uint16_t>(word >> 16));
        float stored = 0.0F;
        std::memcpy(&stored, &word, sizeof(stored));
        return stored;
    });
}

}  // namespace
