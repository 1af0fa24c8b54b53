// SPDX-License-Identifier: Apache-2.0
// The inner loops of the similarity engine, one table per instruction set. Their sources are
// compiled once for each; everything that calls them is compiled once.
#pragma once

#include <cstdint>

#include "cpu/isa.hpp"
#include "params.hpp"

namespace pyfeat {

// Largest tile of any instruction set.
constexpr int kMaxTileQueries = 12;
constexpr int kMaxTileRows = 32;

struct Farthest {
    double squared_distance = -1.0;
    std::int64_t index = -1;
    std::int64_t num_distances = 0;  // computed on the way
};

// How a feature becomes a packed value: (x * row_scale - mean) * scale, computed in float64.
struct Transform {
    const double* mean;  // [D]
    double scale;        // a power of two
};

// What packing one row has made of it, in float64 and in the units of the frame.
struct PackedRow {
    double squared_norm;      // of the transformed row x
    double squared_residual;  // ||x - x^||^2, x^ being what is stored
    double mean_product;      // x . (mean * scale)
};

struct Kernels {
    int tile_queries;   // MR
    int tile_rows;      // NR
    int packed_values;  // features that one 4-byte word of a panel holds: 1 float32 or 2 bfloat16

    // products[r, c] = sum over d of a[d, r] * b[d, c], accumulated in float32.
    // a and b are panels of MR and NR rows; products [MR, NR]; b and products aligned to 64 bytes.
    void (*tile_product)(std::int64_t dim, const float* a, const float* b, float* products);

    // Scores row_terms[c] - products[r, c] in place; bit c of marks[r] says scores[r, c] <=
    // limits[r] (false for NaN). Returns whether any bit is set.
    bool (*mark_scores)(float* products,
                        const float* row_terms,
                        const float* limits,
                        std::uint32_t* marks);

    // Writes one transformed row into column `lane` of a panel [words, width].
    PackedRow (*pack_row)(const float* row,
                          double row_scale,
                          std::int64_t dim,
                          const Transform& transform,
                          float* panel,
                          int width,
                          int lane);

    // 4-byte words of one row of a panel.
    std::int64_t words(std::int64_t dim) const {
        return (dim + packed_values - 1) / packed_values;
    }

    // Sums in float64 over 16 interleaved partial sums, without fused multiply-add: the same bits
    // from every instruction set.
    double (*squared_norm)(const float* row, std::int64_t dim);
    double (*dot)(const double* query, const float* row, std::int64_t dim);
    double (*squared_distance)(const double* query,
                               const float* row,
                               double row_scale,
                               std::int64_t dim);

    // Lowers squared_distances [rows.num_rows] by the distances to `center` [D], pick number
    // `pick`, and returns the largest, the lowest index among equals. A row at or below
    // unreachable[owners[i]] cannot be nearer to the center than to its owner, and is not looked
    // at.
    Farthest (*farthest_pass)(const Rows& rows,
                              const double* center,
                              std::int32_t pick,
                              const double* unreachable,
                              double* squared_distances,
                              std::int32_t* owners);
};

const Kernels& kernels_for(Isa isa);

namespace scalar {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace pyfeat
