// SPDX-License-Identifier: Apache-2.0
// Losses over all pairs: what their launches read and write. Matrices are packed by pack_features,
// float32 vectors and parts are contiguous.
#pragma once

#include <cstdint>

#include "cuda/launch.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

// What packing makes of a matrix: rows and columns with those of zeros that fill it up.
struct PackedShape {
    std::int64_t num_rows, width;
};
PackedShape packed_shape(Dtype dtype, std::int64_t num_rows, std::int64_t dim);
void pack_features(const Rows& features, void* packed, const Queue& queue);

// Two packed matrices, or blocks of them that begin at multiples of 128 rows.
struct PackedPair {
    const void* a;
    const void* b;
    Dtype dtype;
    std::int64_t num_rows, num_columns, width;
};

// How tiles are shared out among thread blocks, and how many parts of sums they leave behind.
struct PairPlan {
    std::int64_t ranges;        // of column tiles
    std::int64_t row_slots;     // parts of a row
    std::int64_t column_slots;  // parts of a column
    std::int64_t sums;          // one for each warp and task
};
PairPlan plan_pairs(const PackedPair& pair, const Queue& queue);

// Rows and columns of a tile, and how many lines it leaves parts behind for at most.
struct PairTileShape {
    std::int64_t num_rows, num_columns, num_lines;
};
PairTileShape pair_tile_shape(Dtype dtype, const Queue& queue);

struct PairSumsCall {
    PackedPair pair;
    PairTerms pairs;
    const double* scale;  // []
    float*
        row_parts;  // [kinds, row_slots, L]; on the diagonal [kinds, row_slots + column_slots, L]
    float* column_parts;  // [kinds, column_slots, S]; null: not wanted
    bool ids, largest, on_diagonal;
};
void pair_sums(const PairSumsCall& call, const Queue& queue);

// Adds parts to sums of lines, in float64 and in the order of slots.
struct MergeSumsCall {
    const float* parts;  // [kinds, slots, lines]
    std::int64_t num_slots, num_lines;
    double* lse;        // [lines], as are the others
    double* positives;  // null: without ids
    double* largest;    // null: not wanted
};
void merge_sums(const MergeSumsCall& call, const Queue& queue);

struct GradientTermsCall {
    const double *lse, *weights, *positives;  // [lines]
    const double* factor;                     // []
    float* terms;                             // [3, lines]
    std::int64_t num_lines;
};
void gradient_terms(const GradientTermsCall& call, const Queue& queue);

// A block of the gradient by similarities, in the dtype of the features, with room for whole
// panels.
struct GradientBlock {
    void* values;  // 16-byte aligned; null: not wanted
    std::int64_t stride;
};

struct PairGradientCall {
    PackedPair pair;
    PairTerms pairs;
    const double* scale;
    const float *row_terms, *column_terms;  // [3, L], [3, S]; null: columns have no part
    std::int64_t row_plane, column_plane;   // from one of the three to the next
    GradientBlock gradient;
    double* sums;  // [PairPlan::sums]
};
void pair_gradient(const PairGradientCall& call, const Queue& queue);

struct PairSoftplusCall {
    PackedPair pair;
    PairTerms pairs;
    const double *scale, *bias;  // []
    float* parts;                // [2, row_slots, L]
    const float* weights;        // [L]; null: no gradient
    GradientBlock gradient;
};
void pair_softplus(const PairSoftplusCall& call, const Queue& queue);

// out += A B^T.
struct AddProductCall {
    PackedPair pair;
    float* out;  // [num_rows, num_columns]
    std::int64_t stride;
};
void add_product(const AddProductCall& call, const Queue& queue);

}  // namespace pyfeat::cuda
