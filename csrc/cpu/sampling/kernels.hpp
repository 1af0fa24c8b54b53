// SPDX-License-Identifier: Apache-2.0
// What the sampling kernels of each instruction set take. Real is float or double: the dtype of
// locations, weights, sums and gradients.
#pragma once

#include <cstdint>

#include "cpu/isa.hpp"
#include "params.hpp"

namespace pyfeat {

// Arrays over the points of a query and head are filled up to a multiple of this.
constexpr std::int64_t kPointBlock = 16;

// The T points that every query and head has, by axis in the order of locations: x first.
template <typename Real>
struct PointTable {
    int num_dims;
    std::int64_t num_points;  // T
    std::int64_t num_slots;   // T filled up
    // The points from the first to the last of a level that fills much of the second-level cache,
    // and of one that it holds little of.
    std::int64_t num_far, num_distant;
    // u = location * factor - shift
    const Real* factors[kMaxDims];  // [slots]
    Real shift;
    const std::int32_t* extents[kMaxDims];  // [slots], cells of the level along the axis
    const std::int32_t* strides[kMaxDims];  // [slots], cells from one to the next along the axis
    const std::int32_t* starts;             // [slots], first cell of the level
    bool border, discrete, softmax;

    // Corners that a point has.
    int num_corners() const {
        return discrete ? 1 : 1 << num_dims;
    }
};

// Queries of one batch and head.
template <typename Real>
struct Samples {
    std::int64_t num_queries;
    const Real* locations;  // [., T, n]
    std::int64_t location_stride;
    const Real* weights;  // [., T]
    std::int64_t weight_stride;
};

// Values of the cells of one batch and head, and what stands for cells outside.
template <typename T>
struct Cells {
    T* data;              // [S, dim]
    std::int64_t stride;  // from one cell to the next
    T* outside;           // [dim]

    T* row(std::int32_t cell) const {
        return cell < 0 ? outside : data + cell * stride;
    }
};

// Features of a query and head.
template <typename T>
struct Features {
    T* data;  // [., dim]
    std::int64_t stride;

    T* row(std::int64_t query) const {
        return data + query * stride;
    }
};

// Where gradients go; null data where they are not wanted.
template <typename Real>
struct SampleGradients {
    Cells<Real> value;                         // added to
    std::int64_t first_feature, num_features;  // the features of `value` that are added to
    Features<Real> locations;                  // [., T n]
    Features<Real> weights;                    // [., T]
};

// Cotangents of the gradients, and where the gradients of their sum of products go.
template <typename Real>
struct SecondOrder {
    Cells<const Real> by_value;
    Features<const Real> by_locations, by_weights;
    Features<Real> output;  // [., dim]
};

template <typename Real>
struct SamplingKernels {
    // values[r * width + d] = rows[r][d] of any dtype, rows being `stride` bytes apart.
    void (*load)(const void* rows,
                 Dtype dtype,
                 std::int64_t stride,
                 std::int64_t num_rows,
                 std::int64_t dim,
                 Real* values,
                 std::int64_t width);

    // to[r * stride + d] = values[r * width + d]; visible to other threads after a fence.
    void (*store)(const Real* values,
                  std::int64_t width,
                  std::int64_t num_rows,
                  std::int64_t dim,
                  Real* to,
                  std::int64_t stride);

    // output[q] = sum over the points of weight * interpolated value
    void (*gather)(const PointTable<Real>& points,
                   const Samples<Real>& samples,
                   const Cells<const Real>& values,
                   std::int64_t dim,
                   const Features<Real>& output,
                   double* scratch);

    void (*gradients)(const PointTable<Real>& points,
                      const Samples<Real>& samples,
                      const Cells<const Real>& values,
                      std::int64_t dim,
                      const Features<const Real>& upstream,
                      const SampleGradients<Real>& gradients,
                      double* scratch);

    void (*second)(const PointTable<Real>& points,
                   const Samples<Real>& samples,
                   const Cells<const Real>& values,
                   std::int64_t dim,
                   const Features<const Real>& upstream,
                   const SecondOrder<Real>& second,
                   const SampleGradients<Real>& gradients,
                   double* scratch);
};

struct SamplingTable {
    SamplingKernels<float> of_float;
    SamplingKernels<double> of_double;

    template <typename Real>
    const SamplingKernels<Real>& of() const {
        if constexpr (sizeof(Real) == sizeof(float)) {
            return of_float;
        } else {
            return of_double;
        }
    }
};

// Scratch of one call, in numbers of 8 bytes: for each of two queries at most 32 arrays over the
// slots and 8 over their corners.
template <typename Real>
std::int64_t scratch_size(const PointTable<Real>& points) {
    return 2 * points.num_slots * (32 + 8 * points.num_corners());
}

const SamplingTable& sampling_kernels_for(Isa isa);

namespace scalar {
extern const SamplingTable sampling_kernels;
}
namespace avx2 {
extern const SamplingTable sampling_kernels;
}
namespace avx512 {
extern const SamplingTable sampling_kernels;
}
namespace neon {
extern const SamplingTable sampling_kernels;
}

}  // namespace pyfeat
