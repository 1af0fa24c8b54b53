// SPDX-License-Identifier: Apache-2.0
// The inner loops of the similarity engine, one table per instruction set. Their sources are
// compiled once for each; everything that calls them is compiled once.
#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/isa.hpp"
#include "params.hpp"

namespace pyfeat {

// Largest tile of any instruction set.
constexpr int kMaxTileQueries = 32;
constexpr int kMaxTileRows = 32;
constexpr int kMaxLanes = 16;  // of one register

// What the tiles multiply, coarsest last.
enum class Precision { kFloat32, kBfloat16, kInt8 };
constexpr int kNumPrecisions = 3;

// How a feature becomes a value to pack: (x * row_scale - mean) * scale, computed in float64.
struct Transform {
    const double* mean;  // [D]
    double scale;        // a power of two
};

// A transformed row, in float64 and in the units of the frame.
struct TransformedRow {
    double squared_norm;
    double mean_product;  // x . (mean * scale)
    double largest;       // magnitude of a feature
};

// What rounding has made of a transformed row x: unit * (whole numbers), or the values themselves.
struct RoundedRow {
    double squared_residual;  // ||x - x^||^2, x^ being what is stored
    float unit;               // 1 unless the panel holds whole numbers
};

// Bounds that hold for every row of one panel, in the frame's units. For query q and row x
//   |score - exact score| <= ||q|| * reach + e_q * norm + slack,   e_q >= ||q - q_packed||.
struct ErrorBounds {
    float norm = 0.0F;
    float reach = 0.0F;
    float slack = 0.0F;
};

// One tile: MR queries by NR rows. Floats lie on 64-byte boundaries, but for the query arrays.
struct Tile {
    std::int64_t words;            // 4-byte words that hold the features of one row
    const float* query_panel;      // [words, MR]
    const float* row_panel;        // [header + words, NR]
    const float* row_terms;        // [NR], NaN for rows that are not there
    const float* row_units;        // [NR]
    const float* query_units;      // [MR]
    const float* query_norms;      // [MR]
    const float* query_residuals;  // [MR], e_q
    const float* thresholds;       // [MR], -infinity for queries that are not there
    ErrorBounds bounds;            // of the row panel
};

// A range of panels, or of rows.
struct PanelRange {
    std::int64_t first, end;
};

// Words of one float32 sum where a product is taken for its own sake.
constexpr std::int64_t kSumBlock = 64;

// The tile product in one precision. Each has its own tile shape and its own way of filling panels.
struct TileKernels {
    int queries;        // MR
    int rows;           // NR
    int packed_values;  // features that one 4-byte word holds: 1, 2 or 4
    int step_words;     // the words of a row are filled up with zeros to a multiple of this
    int header_words;   // of a row panel, for each row

    // Roundings of one product of D features, relative to the norms of its factors: an error of
    // n u / (1 - n u), u = 2^-24, with n = roundings_per_feature * D + roundings.
    int roundings_per_feature, roundings;
    std::int64_t largest_dim;  // D for which sums cannot overflow

    // Rounds one transformed row [D] into column `lane` of a panel.
    RoundedRow (*pack_row)(
        const double* values, std::int64_t dim, double largest, float* panel, int lane);
    RoundedRow (*pack_query)(
        const double* values, std::int64_t dim, double largest, float* panel, int lane);

    // scores[r, c] = row_terms[c] - q_r . x_c, and bit c of marks[r] says that it is no more than
    // thresholds[r] plus its error bound (false for NaN). Returns whether any bit is set; the
    // scores of a query without any are not written.
    bool (*score)(const Tile& tile, float* scores, std::uint32_t* marks);

    // products[r, c] = q_r . x_c of two packed panels, [MR, NR]; whole numbers if those are packed.
    // From float32 panels with n roundings instead, n = min(D, kSumBlock) + D / kSumBlock + 1; from
    // bfloat16 ones with 2 kSumBlock in place of kSumBlock.
    void (*multiply)(std::int64_t words,
                     const float* query_panel,
                     const float* row_panel,
                     float* products);

    // Of the thread that calls score or multiply, before and after; TileUse does it. Null where
    // there is nothing to do.
    void (*begin)();
    void (*end)();

    // 4-byte words of the features of one row.
    std::int64_t words(std::int64_t dim) const {
        const std::int64_t step = packed_values * step_words;
        return (dim + step - 1) / step * step_words;
    }
    // Where the rows of a batch that is both factors can be cut.
    std::int64_t own_unit() const {
        return std::lcm(queries, rows);
    }
    // 4-byte words of one row of a row panel.
    std::int64_t row_words(std::int64_t dim) const {
        return header_words + words(dim);
    }
};

// A thread multiplies tiles only while it holds one of these, and runs nobody else's code
// meanwhile: matrix units are configured, and others may configure them in another way.
class TileUse {
  public:
    explicit TileUse(const TileKernels& tiles) : end_(tiles.end) {
        if (tiles.begin != nullptr) {
            tiles.begin();
        }
    }
    ~TileUse() {
        if (end_ != nullptr) {
            end_();
        }
    }
    TileUse(const TileUse&) = delete;
    TileUse& operator=(const TileUse&) = delete;

  private:
    void (*end_)();
};

// float64 sums over the features of rows of one dtype, over 16 interleaved partial sums and
// without fused multiply-add: the same bits from every instruction set.
struct RowKernels {
    double (*squared_norm)(const void* row, std::int64_t dim);
    double (*dot)(const double* query, const void* row, std::int64_t dim);
    double (*squared_distance)(const double* query,
                               const void* row,
                               double row_scale,
                               std::int64_t dim);
    TransformedRow (*transform)(const void* row,
                                double row_scale,
                                std::int64_t dim,
                                const Transform& transform,
                                double* values);
    // values[d] = row[d] * row_scale
    void (*load)(const void* row, double row_scale, std::int64_t dim, double* values);
    // values[d * stride] = row[d] * row_scale, rounded once
    void (*load_floats)(
        const void* row, double row_scale, std::int64_t dim, std::int64_t stride, float* values);
};

// Sums of powers of two over the rows and the columns of tiles. Each is kept as sum * 2^exponent,
// the exponent being that of its largest term so far: a whole number, so that the sum is moved to
// another one without rounding. Rows have a sum for every lane.
struct PowerSums {
    float* row_exponents;     // [MR, lanes]
    float* row_sums;          // [MR, lanes]
    float* column_exponents;  // [NR]
    double* column_sums;      // [NR]
};

// Stands in a tile for a product that does not count, and in PowerSums for no term so far: its
// power is 0 beside that of any product, which are at most 2^125 in magnitude.
constexpr float kNoProduct = -0x1p126F;

struct PowerKernels {
    int lanes;  // of one register
    // powers[i] = 2^exponents[i] for exponents up to 127; off by at most 1.5 units in the last
    // place, by 2^-126 below that.
    void (*power_of_two)(const float* exponents, std::int64_t count, float* powers);
    // Adds up the sums of a row's lanes under the largest of their exponents, which is kNoProduct
    // where there is none.
    void (*add_lanes)(const float* exponents,
                      const float* sums,
                      int num_rows,
                      float* row_exponents,
                      double* row_sums);
    // Copies to 64-byte boundaries past the caches, which are left to what is read sooner. Visible
    // to other threads after a fence.
    void (*copy_past_caches)(const float* values, std::int64_t count, float* to);
};

// Of the pairs of one tile, which are positive and which do not count. Ids are whole numbers of 32
// bits; null where there are none.
struct PairTile {
    const float* column_bias;                 // [NR], added to the products
    const float *row_ids, *column_ids;        // [MR], [NR], positive where equal
    const float *row_groups, *column_groups;  // [MR], [NR], left out where equal,
    bool keep_positives;                      // unless positive
    bool separate_positives;                  // positive pairs have no power
    bool only_positives;                      // others have none

    bool empty() const {
        return column_bias == nullptr && row_ids == nullptr && row_groups == nullptr &&
               !only_positives;
    }
};

// Of the products of a tile; null where not wanted.
struct ProductStatistics {
    double* row_positives;     // [MR], sums over positive pairs
    double* column_positives;  // [NR]
    float* row_largest;        // [MR], of pairs that count and are not positive
    float* column_largest;     // [NR]
};

// A row's or a column's part of the gradient: weight * 2^(product - shift) for every pair, shifts
// being whole and no less than the largest product minus 126, and `positive` for positive pairs.
struct GradientTerms {
    const float *shifts, *weights, *positives;
};

// Z = y (products + bias), bias = bias + bias_rest in units of the products, y = -1 for positive
// pairs and 1 for others.
struct SoftplusTerms {
    float bias, bias_rest;
    int num_columns;       // that are there
    const float* weights;  // [MR]
};

struct SoftplusSums {
    float* softplus;  // [MR, lanes]
    float* sigmoids;  // [MR, lanes], of y sigmoid(Z)
};

constexpr std::int64_t kGradientRows = 192;     // a multiple of every MR
constexpr std::int64_t kGradientColumns = 320;  // a multiple of every NR
// From one row to the next; not a multiple of 2 KB, which would fill few sets of the cache.
constexpr std::int64_t kGradientStride = kGradientColumns + 16;

// What losses do with tiles of one precision. dS is multiplied with features in that precision too,
// with float32 sums. In bfloat16 a 4-byte word holds a pair of values: of dS two columns or, for
// the transpose, two rows; of the features two rows.
struct ContrastKernels {
    Precision precision;
    int product_rows;  // of the sums that a product adds to

    // products *= factor, [MR, NR]; null where A takes the scale in.
    void (*scale)(float* products, float factor);

    // Adds 2^products, [MR, NR], to the sums of its rows and columns; a row's lane gets at most 4
    // terms.
    void (*add_powers)(const float* products, const PowerSums& sums);

    // Adds the bias to products [MR, NR], takes their statistics, and puts kNoProduct in place of
    // those that have no power.
    void (*adjust)(float* products, const PairTile& pairs, const ProductStatistics& statistics);

    // gradient[r, c], MR rows of stride kGradientStride, from products that are not adjusted;
    // columns have no part if their terms are null.
    void (*gradient)(const float* products,
                     const PairTile& pairs,
                     const GradientTerms& rows,
                     const GradientTerms& columns,
                     float* gradient);

    // Adds softplus(Z) and y sigmoid(Z) of pairs that count to the sums and writes
    // gradient[r, c] = weights[r] y sigmoid(Z), 0 for pairs that do not count; MR rows of stride
    // kGradientStride.
    void (*softplus)(const float* products,
                     const PairTile& pairs,
                     const SoftplusTerms& terms,
                     const SoftplusSums& sums,
                     float* gradient);

    // Rounds MR rows of a block of dS, those from `row` on, which have the stride kGradientStride.
    // Pairs of columns and pairs of rows go to where the products with the block look for them: up
    // to kGradientRows * kGradientStride words, and half as many. Null where products take the
    // block as it is.
    void (*round)(const float* gradient,
                  std::int64_t row,
                  std::int64_t num_columns,
                  float* column_pairs,
                  float* row_pairs);

    // sums[r, d] += gradient[row + r, w] panel[w, d] over `words` w, for product_rows r and NR d;
    // sums[r, d] += gradient[w, column + r] panel[w, d] for the transpose. Row and column are
    // multiples of product_rows. Rows of sums are `stride` apart and on 64-byte boundaries; only
    // the first `rows` are written.
    void (*multiply)(std::int64_t words,
                     const float* gradient,
                     std::int64_t row,
                     const float* panel,
                     float* sums,
                     std::int64_t stride,
                     int rows);
    void (*multiply_transposed)(std::int64_t words,
                                const float* gradient,
                                std::int64_t column,
                                const float* panel,
                                float* sums,
                                std::int64_t stride,
                                int rows);
};

struct Kernels {
    RowKernels rows[kNumDtypes];        // by Dtype
    TileKernels tiles[kNumPrecisions];  // by Precision
    PowerKernels powers;
    ContrastKernels contrast;
    ContrastKernels bf16_contrast;  // of bfloat16 features: float32 without instructions for them
    // Fastest last.
    Precision order[kNumPrecisions];

    const RowKernels& row_kernels(Dtype dtype) const {
        return rows[static_cast<int>(dtype)];
    }
    const TileKernels& tile_kernels(Precision precision) const {
        return tiles[static_cast<int>(precision)];
    }
    const ContrastKernels& contrast_kernels(Dtype dtype) const {
        return dtype == Dtype::kBfloat16 ? bf16_contrast : contrast;
    }
};

const Kernels& kernels_for(Isa isa);

const char* precision_name(Precision precision);

// `name` or, if it is empty, the fastest for rows of this width; throws if there is none such.
Precision resolve_precision(const std::string& name, Isa isa, std::int64_t dim);

namespace scalar {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx2_vnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}
namespace neon_dot {
extern const Kernels kernels;
}

}  // namespace pyfeat
