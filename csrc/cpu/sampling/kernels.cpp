// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set.
#include "cpu/sampling/kernels.hpp"

#include "cpu/sampling/copies.hpp"
#include "cpu/sampling/sample.hpp"

namespace pyfeat::PYFEAT_ISA_NAMESPACE {
namespace {

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
    return {load_rows<Real>,
            store_rows<Real>,
            gather_points<Real>,
            sample_gradients<Real>,
            sample_second<Real>};
}

}  // namespace

const SamplingTable sampling_kernels{kernels_of<float>(), kernels_of<double>()};

}  // namespace pyfeat::PYFEAT_ISA_NAMESPACE
