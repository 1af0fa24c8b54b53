// SPDX-License-Identifier: Apache-2.0
// bfloat16 and int8 tiles on matrix units (Intel AMX): one instruction multiplies 16 queries by 16
// rows over 64 bytes of features, 16 times the rate of AVX-512 in 16 cycles. A tile is two by two
// of these, each factor loaded once for two products: as many loads as products, which is what the
// first-level cache can feed. Row panels are [words, 32] as elsewhere; query panels are
// [words / 16, 32, 16], so that a load finds 64 bytes of each query side by side.
#pragma once

#include "cpu/similarity/tile_bf16.hpp"
#include "cpu/similarity/tile_int8.hpp"
#if defined(PYFEAT_EMULATED_AMX)
#include "emulated_amx.hpp"  // of the tests
#endif

namespace {

constexpr int kUnitRows = 16, kUnitWords = 16;
constexpr int kMatrixQueries = 2 * kUnitRows, kMatrixRows = 2 * kUnitRows;
static_assert(kMatrixRows == kTileRows, "score_products takes rows in registers");

// Palette 1: eight tiles of 16 rows of 64 bytes.
struct alignas(64) MatrixConfiguration {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(MatrixConfiguration) == 64);

inline void begin_matrices() {
    static constexpr MatrixConfiguration configuration;
    _tile_loadconfig(&configuration);
}
inline void end_matrices() {
    _tile_release();
}

struct MatrixRows {
    static constexpr int kStep = kUnitWords;

    static std::int64_t at(std::int64_t word, int lane) {
        return (word / kUnitWords * kMatrixQueries + lane) * kUnitWords + word % kUnitWords;
    }
};
using MatrixColumns = Columns<kMatrixRows, kUnitWords>;

// multiply(sum, queries, rows) needs literal numbers of tiles: 0 to 3 hold the sums, 4 and 5
// queries, 6 and 7 rows.
#define PYFEAT_MULTIPLY_MATRICES(multiply)                                     \
    _tile_zero(0);                                                             \
    _tile_zero(1);                                                             \
    _tile_zero(2);                                                             \
    _tile_zero(3);                                                             \
    constexpr int kQueryStride = 4 * kUnitWords, kRowStride = 4 * kMatrixRows; \
    for (std::int64_t w = 0; w < words; w += kUnitWords) {                     \
        _tile_loadd(6, row_panel, kRowStride);                                 \
        _tile_loadd(4, query_panel, kQueryStride);                             \
        multiply(0, 4, 6);                                                     \
        _tile_loadd(7, row_panel + kUnitRows, kRowStride);                     \
        multiply(1, 4, 7);                                                     \
        _tile_loadd(5, query_panel + kUnitRows * kUnitWords, kQueryStride);    \
        multiply(2, 5, 6);                                                     \
        multiply(3, 5, 7);                                                     \
        query_panel += kMatrixQueries * kUnitWords;                            \
        row_panel += kMatrixRows * kUnitWords;                                 \
    }                                                                          \
    _tile_stored(0, products, kRowStride);                                     \
    _tile_stored(1, products + kUnitRows, kRowStride);                         \
    _tile_stored(2, products + kUnitRows * kMatrixRows, kRowStride);           \
    _tile_stored(3, products + kUnitRows * kMatrixRows + kUnitRows, kRowStride)

// float32 sums: 32 features are multiplied and added one after the other, odd and even ones apart;
// both sums are then added to that of the tile. Subnormal numbers count as zero throughout.
struct Bfloat16Matrix : Bfloat16Product {
    static void multiply(std::int64_t words,
                         const float* query_panel,
                         const float* row_panel,
                         float* products) {
        PYFEAT_MULTIPLY_MATRICES(_tile_dpbf16ps);
    }
};

// Signed bytes on both sides, and so no header.
struct Int8Matrix : Int8Product {
    static void multiply(std::int64_t words,
                         const float* query_panel,
                         const float* row_panel,
                         float* products) {
        PYFEAT_MULTIPLY_MATRICES(_tile_dpbssd);
    }
};

#undef PYFEAT_MULTIPLY_MATRICES

template <typename Matrix>
bool score_matrix(const pyfeat::Tile& tile, float* scores, std::uint32_t* marks) {
    Matrix::multiply(tile.words, tile.query_panel, tile.row_panel, scores);
    return score_products<Matrix, kMatrixQueries>(tile, scores, marks);
}

constexpr pyfeat::TileKernels bf16_matrix_tiles() {
    return {kMatrixQueries,
            kMatrixRows,
            2,
            kUnitWords,
            0,
            2,  // of D and 2 for every 32 of them
            2,
            std::int64_t{1} << 20,
            pack_bf16<MatrixColumns>,
            pack_bf16<MatrixRows>,
            score_matrix<Bfloat16Matrix>,
            Bfloat16Matrix::multiply,
            begin_matrices,
            end_matrices};
}

constexpr pyfeat::TileKernels int8_matrix_tiles() {
    return {kMatrixQueries,
            kMatrixRows,
            4,
            kUnitWords,
            0,
            0,
            4,
            std::int64_t{1} << 17,  // 2^17 * 127 * 127 < 2^31
            pack_int8<MatrixColumns, kRowLevels, 0, 0>,
            pack_int8<MatrixRows, kRowLevels, 0, 0>,
            score_matrix<Int8Matrix>,
            Int8Matrix::multiply,
            begin_matrices,
            end_matrices};
}

}  // namespace
