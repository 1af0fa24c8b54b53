// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set.
#include "cpu/sampling/kernels.hpp"

#include "cpu/sampling/sample.hpp"
#include "cpu/simd/elements.hpp"

namespace pyfeat::PYFEAT_ISA_NAMESPACE {
namespace {

template <typename Element, typename Real>
void load_as(const void* row, std::int64_t dim, Real* values) {
    const auto* elements = static_cast<const Element*>(row);
    for (std::int64_t d = 0; d < dim; ++d) {
        values[d] = static_cast<Real>(static_cast<double>(elements[d]));
    }
}

template <typename Real>
void load_row(const void* row, Dtype dtype, std::int64_t dim, Real* values) {
    switch (dtype) {
        case Dtype::kFloat32:
            return load_as<Float32>(row, dim, values);
        case Dtype::kFloat64:
            return load_as<Float64>(row, dim, values);
        case Dtype::kFloat16:
            return load_as<Float16>(row, dim, values);
        case Dtype::kBfloat16:
            return load_as<Bfloat16>(row, dim, values);
    }
}

// use(n, whether sampling is discrete), both constants.
template <typename Use>
void for_dims(int num_dims, bool discrete, Use use) {
    const auto with = [&](auto dims) {
        if (discrete) {
            use(dims, std::true_type{});
        } else {
            use(dims, std::false_type{});
        }
    };
    switch (num_dims) {
        case 1:
            return with(std::integral_constant<int, 1>{});
        case 2:
            return with(std::integral_constant<int, 2>{});
        default:
            return with(std::integral_constant<int, 3>{});
    }
}

template <typename Real>
void gather_points(const PointTable<Real>& points,
                   const Samples<Real>& samples,
                   const Cells<const Real>& values,
                   std::int64_t dim,
                   const Features<Real>& output,
                   double* scratch) {
    for_dims(points.num_dims, points.discrete, [&](auto dims, auto discrete) {
        gather<Real, dims(), discrete()>(points, samples, values, dim, output, scratch);
    });
}

template <typename Real>
void sample_gradients(const PointTable<Real>& points,
                      const Samples<Real>& samples,
                      const Cells<const Real>& values,
                      std::int64_t dim,
                      const Features<const Real>& upstream,
                      const SampleGradients<Real>& to,
                      double* scratch) {
    for_dims(points.num_dims, points.discrete, [&](auto dims, auto discrete) {
        gradients<Real, dims(), discrete()>(points, samples, values, dim, upstream, to, scratch);
    });
}

template <typename Real>
void sample_second(const PointTable<Real>& points,
                   const Samples<Real>& samples,
                   const Cells<const Real>& values,
                   std::int64_t dim,
                   const Features<const Real>& upstream,
                   const SecondOrder<Real>& second,
                   const SampleGradients<Real>& to,
                   double* scratch) {
    for_dims(points.num_dims, points.discrete, [&](auto dims, auto discrete) {
        second_gradients<Real, dims(), discrete()>(
            points, samples, values, dim, upstream, second, to, scratch);
    });
}

template <typename Real>
constexpr SamplingKernels<Real> kernels_of() {
    return {load_row<Real>, gather_points<Real>, sample_gradients<Real>, sample_second<Real>};
}

}  // namespace

const SamplingTable sampling_kernels{kernels_of<float>(), kernels_of<double>()};

}  // namespace pyfeat::PYFEAT_ISA_NAMESPACE
