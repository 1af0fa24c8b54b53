// SPDX-License-Identifier: Apache-2.0
// int8 tiles: panels [(D + 3) / 4, width] of four features to a word, each row a unit times whole
// numbers. Sums of products are exact. Where the instruction takes unsigned bytes for one factor,
// queries are stored with kQueryOffset added to every byte, and the sums of a row start from
// -kQueryOffset times the sum of its bytes, kept in the first word of its column.
#pragma once

#include <cstring>

#include "cpu/similarity/tile.hpp"

namespace {

constexpr int kRowLevels = 127;

struct Int8Product {
    using Sum = Ints;
    using Words = Ints;
    static constexpr int kHeaderWords = 1;

    static Sum first(const float* header) {
        return load_ints(header);
    }
    static Words load_rows(const float* p) {
        return load_ints(p);
    }
    static Words load_query(const float* p) {
        return broadcast_word(p);
    }
    static Sum accumulate(Words query, Words rows, Sum sum) {
        return multiply_bytes(query, rows, sum);
    }
    static void put(float* p, Sum sum) {
        store_ints(p, sum);
    }
    // Four roundings at most: to float32, two products, and where they are not fused a difference.
    static Floats score(const float* product, Floats term, Floats row_unit, Floats query_unit) {
        const Floats scaled = multiply(to_floats(load_ints(product)), row_unit);
        return negative_multiply_add(query_unit, scaled, term);
    }
};

// Bytes are whole numbers in [-kLevels, kLevels] plus kOffset.
template <typename Layout, int kLevels, int kOffset, int kHeaderWords>
pyfeat::RoundedRow pack_int8(
    const double* exact, std::int64_t dim, double largest, float* panel, int lane) {
    const float unit = static_cast<float>(largest / kLevels);
    // Below the smallest normal number a unit loses digits: such a row is packed as zeros.
    const bool zeros = !(unit >= 0x1p-126F);
    const float inverse = zeros ? 0.0F : 1.0F / unit;
    constexpr std::uint32_t kBitsOfRound = 0x4B400000;
    std::uint32_t sums[kSums] = {};
    const auto block =
        [&](std::int64_t first, auto count, float* values, double* rounded) PYFEAT_INLINE {
            // Adding 1.5 * 2^23 leaves a whole number in the lowest bits. It is at most kLevels, as
            // no value is larger than `largest` and the roundings here are far from half a unit.
            constexpr float kRound = 12582912.0F;
            std::uint32_t bits[kSums];
            std::uint8_t bytes[kSums];
            for (int i = 0; i < kSums; ++i) {
                values[i] = values[i] * inverse + kRound;
            }
            std::memcpy(bits, values, sizeof(bits));
            for (int i = 0; i < kSums; ++i) {
                rounded[i] = static_cast<double>(values[i] - kRound) * static_cast<double>(unit);
            }
            for (int i = 0; i < kSums; ++i) {
                bytes[i] = static_cast<std::uint8_t>(bits[i] + kOffset);
            }
            for (int i = 0; i < kSums; ++i) {
                sums[i] += bits[i] - kBitsOfRound;
            }
            for (std::int64_t i = 0; i < count; i += 4) {
                std::memcpy(panel + Layout::at(kHeaderWords + (first + i) / 4, lane), bytes + i, 4);
            }
        };
    const double residual = round_in_blocks(exact, dim, block);
    fill_up<Layout>((dim + 3) / 4, panel, lane);
    if (kHeaderWords > 0) {
        std::uint32_t start = 0;  // modulo 2^32, as two's complement
        for (const std::uint32_t sum : sums) {
            start -= kQueryOffset * sum;
        }
        std::memcpy(panel + lane, &start, sizeof(start));
    }
    return {residual, unit};
}

constexpr pyfeat::TileKernels int8_tiles() {
    return {kTileQueries,
            kTileRows,
            4,
            1,
            Int8Product::kHeaderWords,
            0,
            4,
            std::int64_t{1} << 15,  // 2^15 * 256 * 127 < 2^31
            pack_int8<Columns<kTileRows>, kRowLevels, 0, Int8Product::kHeaderWords>,
            pack_int8<Columns<kTileQueries>, kQueryLevels, kQueryOffset, 0>,
            score_tile<Int8Product>,
            multiply_panels<Int8Product>,
            nullptr,
            nullptr};
}

}  // namespace
