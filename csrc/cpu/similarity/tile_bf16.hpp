// SPDX-License-Identifier: Apache-2.0
// bfloat16 tiles: panels [(D + 1) / 2, width] of pairs, features 2 i and 2 i + 1 in one word. One
// instruction multiplies both and adds them to a float32 sum, where the processor has it: twice the
// rate of float32. Elsewhere the words are widened, which halves what is read and nothing else.
#pragma once

#include <cstring>

#include "cpu/similarity/tile.hpp"

namespace {

// Products of bfloat16 are exact in float32, so every feature costs one rounding, as in float32
// tiles. The instruction flushes subnormal numbers; the error bound allows for that.
struct Bfloat16Product {
    using Sum = Floats;
    using Words = Ints;
    static constexpr int kHeaderWords = 0;

    static Sum first(const float*) {
        return zero();
    }
    static Words load_rows(const float* p) {
        return load_ints(p);
    }
    static Words load_query(const float* p) {
        return broadcast_word(p);
    }
    static Sum accumulate(Words query, Words rows, Sum sum) {
#if defined(PYFEAT_ISA_AVX512_BF16)
        return _mm512_dpbf16_ps(
            sum, reinterpret_cast<__m512bh>(query), reinterpret_cast<__m512bh>(rows));
#else
        sum = multiply_add(low_halves(query), low_halves(rows), sum);
        return multiply_add(high_halves(query), high_halves(rows), sum);
#endif
    }
    static void put(float* p, Sum sum) {
        store(p, sum);
    }
    static Floats score(const float* product, Floats term, Floats, Floats) {
        return subtract(term, load(product));
    }
};

template <typename Layout>
pyfeat::RoundedRow pack_bf16(
    const double* exact, std::int64_t dim, double, float* panel, int lane) {
    const auto block =
        [=](std::int64_t first, auto count, float* values, double* rounded) PYFEAT_INLINE {
            std::uint32_t bits[kSums];
            std::memcpy(bits, values, sizeof(bits));
            for (std::uint32_t& word : bits) {
                word += 0x7FFFU + ((word >> 16) & 1U);  // to nearest, ties to even
                word &= 0xFFFF0000U;
            }
            std::memcpy(values, bits, sizeof(bits));
            for (int i = 0; i < kSums; ++i) {
                rounded[i] = static_cast<double>(values[i]);
            }
            for (std::int64_t i = 0; i < count; i += 2) {
                const std::uint32_t pair = (bits[i] >> 16) | bits[i + 1];
                std::memcpy(panel + Layout::at((first + i) / 2, lane), &pair, sizeof(pair));
            }
        };
    const double residual = round_in_blocks(exact, dim, block);
    fill_up<Layout>((dim + 1) / 2, panel, lane);
    return {residual, 1.0F};
}

constexpr pyfeat::TileKernels bf16_tiles() {
    return {kTileQueries,
            kTileRows,
            2,
            1,
            Bfloat16Product::kHeaderWords,
            1,
            0,
            std::int64_t{1} << 20,
            pack_bf16<Columns<kTileRows>>,
            pack_bf16<Columns<kTileQueries>>,
            score_tile<Bfloat16Product>,
            multiply_in_blocks<Bfloat16Product>,
            nullptr,
            nullptr};
}

}  // namespace
