// SPDX-License-Identifier: Apache-2.0
// float32 tiles: panels [D, width] of floats.
#pragma once

#include "cpu/similarity/tile.hpp"

namespace {

struct Float32Product {
    using Sum = Floats;
    using Words = Floats;
    static constexpr int kHeaderWords = 0;

    static Sum first(const float*) {
        return zero();
    }
    static Words load_rows(const float* p) {
        return load(p);
    }
    static Words load_query(const float* p) {
        return broadcast(*p);
    }
    static Sum accumulate(Words query, Words rows, Sum sum) {
        return multiply_add(query, rows, sum);
    }
    static void put(float* p, Sum sum) {
        store(p, sum);
    }
    static Floats score(const float* product, Floats term, Floats, Floats) {
        return subtract(term, load(product));
    }
};

template <int kWidth>
pyfeat::RoundedRow pack_float32(
    const double* exact, std::int64_t dim, double, float* panel, int lane) {
    const auto block = [=](std::int64_t first, auto count, float* values, double* rounded)
                           PYFEAT_INLINE {
                               for (int i = 0; i < kSums; ++i) {
                                   rounded[i] = static_cast<double>(values[i]);
                               }
                               for (std::int64_t i = 0; i < count; ++i) {
                                   panel[(first + i) * kWidth + lane] = values[i];
                               }
                           };
    const double residual = round_in_blocks(exact, dim, block);
    return {residual, 1.0F};
}

constexpr pyfeat::TileKernels float32_tiles() {
    return {kTileQueries,
            kTileRows,
            1,
            1,
            Float32Product::kHeaderWords,
            1,
            0,
            std::int64_t{1} << 20,  // keeps n u far below 1/2
            pack_float32<kTileRows>,
            pack_float32<kTileQueries>,
            score_tile<Float32Product>,
            multiply_in_blocks<Float32Product>,
            nullptr,
            nullptr};
}

}  // namespace
