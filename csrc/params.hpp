// SPDX-License-Identifier: Apache-2.0
// What each op reads and writes. Strides are in elements; the last axis is contiguous.
#pragma once

#include <cstdint>
#include <vector>

namespace pyfeat {

enum class Metric : std::int32_t { kEuclidean, kSquaredEuclidean, kCosine, kInnerProduct };

enum class Dtype : std::int32_t { kFloat32, kFloat64, kFloat16, kBfloat16 };
constexpr int kNumDtypes = 4;

constexpr std::int64_t bytes_of(Dtype dtype) {
    return dtype == Dtype::kFloat64 ? 8 : (dtype == Dtype::kFloat32 ? 4 : 2);
}

// A matrix of features that the op only reads.
struct Rows {
    const void* data;  // [num_rows, dim]
    Dtype dtype;
    std::int64_t num_rows;
    std::int64_t dim;     // D
    std::int64_t stride;  // from one row to the next

    // Of one row, from a feature on.
    const void* row(std::int64_t index, std::int64_t feature = 0) const {
        return static_cast<const char*>(data) + (index * stride + feature) * bytes_of(dtype);
    }
};

// Which rows may answer which query: one mask for all queries, or one for each.
struct Mask {
    const std::uint8_t* data = nullptr;  // [N] or [Q, N], not 0 where allowed; null: all are
    std::int64_t query_stride = 0;       // 0: one mask for all queries

    bool allows(std::int64_t query, std::int64_t row) const {
        return data == nullptr || data[query * query_stride + row] != 0;
    }
};

// Rows that hold NaN or infinity either make the op throw or are as if they were not there.
enum class NonFinite : std::int32_t { kRefuse, kSkip };

struct SearchParams {
    const char* op;  // for messages
    Rows queries;    // [Q, D]
    Rows memory;     // [N, D]
    Metric metric;
    Mask mask;
    NonFinite nonfinite;
    double bound_scale;  // of the error bounds; 1 but for tests that show what they are for
};

struct KnnParams : SearchParams {
    std::int64_t k;         // 1 <= k <= N
    void* distances;        // [Q, k], contiguous
    Dtype distance_dtype;   // float32 or float64
    std::int64_t* indices;  // [Q, k], contiguous; -1 where the query has fewer than k rows
};

struct RangeParams : SearchParams {
    double radius;  // euclidean, sqeuclidean, cosine: at most; inner product: at least
};

// The rows of query q are those from offsets[q] to offsets[q + 1], nearest first.
struct RangeResult {
    std::vector<std::int64_t> offsets;  // [Q + 1]
    std::vector<std::int64_t> indices;
    std::vector<double> distances;
};

struct FarthestParams {
    Rows rows;                        // [N, D], finite
    std::int64_t start;               // the first pick; -1: the row with the largest distance
    const double* squared_distances;  // [N], to what the rows are near already; null: infinite
};

// Of the similarities S = scale * A B^T + bias, which are positive and which do not count. Null
// where there are none such. Ids are at least 0.
struct PairTerms {
    const float* column_bias = nullptr;           // [S]
    const std::int32_t* row_ids = nullptr;        // [L], positive where equal
    const std::int32_t* column_ids = nullptr;     // [S]
    const std::int32_t* row_groups = nullptr;     // [L], left out where equal,
    const std::int32_t* column_groups = nullptr;  // [S]
    bool keep_positives = false;                  // unless positive
    // Log-sum-exps are over what is not positive: where one similarity outweighs all others, its
    // distance to them keeps its digits.
    bool separate_positives = false;
    bool only_positives = false;  // log-sum-exps are over what is positive

    bool empty() const {
        return column_bias == nullptr && row_ids == nullptr && row_groups == nullptr;
    }
};

// Tiles of the product that the forward pass leaves to the backward pass: those of the first rows
// of A, tile after tile.
struct KeptTiles {
    float* products = nullptr;
    std::int64_t num_panels = 0;  // of rows of A
};

// Sums over the rows and the columns of S.
struct LogSumExpParams {
    Rows a;  // [L, D]
    Rows b;  // [S, D]
    double scale;
    Dtype product_dtype;              // float32: tiles; float64: dot by dot, several times slower
    double* row_lse;                  // [L], contiguous; -infinity where no column counts
    double* column_lse;               // [S], contiguous; -infinity where no row counts
    PairTerms pairs;                  // float32 products only
    double* row_positives = nullptr;  // [L], sums of S over positive columns; null: not wanted
    double* column_positives = nullptr;  // [S]
    // [L], the largest S of every row that counts and is not positive, -infinity where there is
    // none; null: not wanted.
    double* row_largest = nullptr;
    // A and B are the same rows, and pairs say the same of ij and ji: half of the products do. Then
    // nothing is written for columns.
    bool itself = false;
    KeptTiles kept;
};

// What a matrix dS [L, S] is multiplied with, and where to.
struct PairProducts {
    Rows a_values;  // [L, E]
    Rows b_values;  // [S, F]
    float* a;       // [L, F], dS b_values, contiguous; null: not wanted
    float* b;       // [S, E], dS^T a_values, contiguous; null: not wanted
};

// Products with scale dS, the gradients of a loss by A and B if values are the features. With
// P = exp(S - row_lse) and R = exp(S - column_lse),
//   dS = row_weights P + column_weights R + (row_positives + column_positives where positive).
struct ContrastGradientParams {
    Rows a;  // [L, D]
    Rows b;  // [S, D]
    double scale;
    PairTerms pairs;
    PairProducts products;
    const double* row_lse;           // [L]
    const double* column_lse;        // [S]; null: columns have no part
    const double* row_weights;       // [L]
    const double* column_weights;    // [S]
    const double* row_positives;     // [L]
    const double* column_positives;  // [S]
    // A and B are the same rows, and so are values and what is said of rows and columns: half of
    // the pairs do, and only products.a is written.
    bool itself;
    KeptTiles kept;
};

// Of Z = y (scale * A B^T + bias), y = -1 where positive and 1 elsewhere, the sums of softplus(Z),
// and products with scale dS = scale * weights y sigmoid(Z), their gradient if rows weigh so much.
struct SoftplusParams {
    Rows a;  // [L, D]
    Rows b;  // [S, D]
    double scale;
    double bias;
    PairTerms pairs;
    PairProducts products;
    const double* weights;  // [L]
    double* softplus;       // [L]
    double* sigmoids;       // [L], sums of y sigmoid(Z), what the bias changes softplus by
};

// Counts of one search, for tests and benchmarks.
struct SearchCounters {
    std::int64_t reranked = 0;    // rows whose distance was taken in float64
    std::int64_t retried = 0;     // queries whose shortlist overflowed in the first precision
    std::int64_t exhaustive = 0;  // queries that took every row in float64
};

constexpr int kMaxDims = 3;

// Deformable attention. Real is the dtype of locations and weights: double if values are, else
// float.
struct DeformAttnParams {
    std::int64_t batch, num_cells, heads, dim, num_queries;  // B, S, H, D, Q
    const void* value;                                       // [B, S, H, D]
    Dtype dtype;
    std::int64_t value_strides[3];  // of B, S, H

    int num_dims;                          // n
    std::vector<std::int64_t> shapes;      // [L n], in the order of the axes in memory
    std::vector<std::int64_t> num_points;  // [L]
    bool border, align_corners, discrete, softmax;

    const void* locations;             // [B, Q, H, T, n], x first, [T, n] contiguous
    std::int64_t location_strides[3];  // of B, Q, H
    const void* weights;               // [B, Q, H, T]
    std::int64_t weight_strides[3];
};

// Contiguous arrays of Real; null where not wanted. Discrete sampling does not write locations'.
struct DeformAttnGradients {
    const void* upstream;  // [B, Q, H, D]
    void *value, *locations, *weights;
};

struct DeformAttnSecond {
    const void *by_value, *by_locations, *by_weights;  // cotangents of the gradients, contiguous
    void* output;                                      // [B, Q, H, D]
};

}  // namespace pyfeat
