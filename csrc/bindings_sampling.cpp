// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic.
#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "check.hpp"
#include "cpu/sampling/deform_attn.hpp"

namespace pyfeat {
namespace {

using Size = std::int64_t;
// Address, dtype, strides of B, S, H.
using Value = std::tuple<std::uintptr_t, Dtype, Size, Size, Size>;
// B, S, H, D, Q
using Sizes = std::array<Size, 5>;
// Dimensions, shapes, points of each level, border, align_corners, discrete, softmax.
using Levels = std::tuple<int, std::vector<Size>, std::vector<Size>, bool, bool, bool, bool>;
// Address, strides of B, Q, H.
using Points = std::tuple<std::uintptr_t, Size, Size, Size>;

DeformAttnParams to_params(const Value& value,
                           const Sizes& sizes,
                           const Levels& levels,
                           const Points& locations,
                           const Points& weights) {
    const auto& [address, dtype, batch_stride, cell_stride, head_stride] = value;
    const auto& [num_dims, shapes, num_points, border, align_corners, discrete, softmax] = levels;
    PYFEAT_CHECK(num_dims >= 1 && num_dims <= kMaxDims,
                 "deform_attn: dimensions must be 1, 2 or 3, got ",
                 num_dims);
    PYFEAT_CHECK(shapes.size() == num_points.size() * static_cast<std::size_t>(num_dims),
                 "deform_attn: shapes must hold ",
                 num_dims,
                 " sizes for each of ",
                 num_points.size(),
                 " levels, got ",
                 shapes.size());
    Size cells = 0;
    for (std::size_t level = 0; level < num_points.size(); ++level) {
        Size product = 1;
        for (int j = 0; j < num_dims; ++j) {
            product *=
                shapes[level * static_cast<std::size_t>(num_dims) + static_cast<std::size_t>(j)];
        }
        cells += product;
    }
    PYFEAT_CHECK(
        cells == sizes[1], "deform_attn: shapes must hold ", sizes[1], " cells, got ", cells);
    return {sizes[0],
            sizes[1],
            sizes[2],
            sizes[3],
            sizes[4],
            to_pointer<const void>(address),
            dtype,
            {batch_stride, cell_stride, head_stride},
            num_dims,
            shapes,
            num_points,
            border,
            align_corners,
            discrete,
            softmax,
            to_pointer<const void>(std::get<0>(locations)),
            {std::get<1>(locations), std::get<2>(locations), std::get<3>(locations)},
            to_pointer<const void>(std::get<0>(weights)),
            {std::get<1>(weights), std::get<2>(weights), std::get<3>(weights)}};
}

// Addresses of arrays by the values, the locations and the weights.
using Addresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

DeformAttnGradients to_gradients(std::uintptr_t upstream, const Addresses& gradients) {
    return {to_pointer<const void>(upstream),
            to_pointer<void>(std::get<0>(gradients)),
            to_pointer<void>(std::get<1>(gradients)),
            to_pointer<void>(std::get<2>(gradients))};
}

void bind_forward(const Value& value,
                  const Sizes& sizes,
                  const Levels& levels,
                  const Points& locations,
                  const Points& weights,
                  std::uintptr_t output,
                  int num_threads,
                  const std::string& isa_name) {
    const DeformAttnParams params = to_params(value, sizes, levels, locations, weights);
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        deform_attn_cpu(params, to_pointer<void>(output), isa, execution);
        return true;
    });
}

void bind_backward(const Value& value,
                   const Sizes& sizes,
                   const Levels& levels,
                   const Points& locations,
                   const Points& weights,
                   std::uintptr_t upstream,
                   const Addresses& gradients,
                   int num_threads,
                   const std::string& isa_name) {
    const DeformAttnParams params = to_params(value, sizes, levels, locations, weights);
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        deform_attn_backward_cpu(params, to_gradients(upstream, gradients), isa, execution);
        return true;
    });
}

void bind_second(const Value& value,
                 const Sizes& sizes,
                 const Levels& levels,
                 const Points& locations,
                 const Points& weights,
                 std::uintptr_t upstream,
                 const Addresses& cotangents,
                 const std::tuple<Addresses, std::uintptr_t>& gradients,
                 int num_threads,
                 const std::string& isa_name) {
    const DeformAttnParams params = to_params(value, sizes, levels, locations, weights);
    const DeformAttnSecond second{to_pointer<const void>(std::get<0>(cotangents)),
                                  to_pointer<const void>(std::get<1>(cotangents)),
                                  to_pointer<const void>(std::get<2>(cotangents)),
                                  to_pointer<void>(std::get<1>(gradients))};
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        deform_attn_second_cpu(
            params, second, to_gradients(upstream, std::get<0>(gradients)), isa, execution);
        return true;
    });
}

}  // namespace

void bind_sampling(py::module_& m) {
    const auto def = [&m](const char* name, auto function, auto... arguments) {
        m.def(name,
              function,
              py::arg("value"),
              py::arg("sizes"),
              py::arg("levels"),
              py::arg("locations"),
              py::arg("weights"),
              arguments...,
              py::arg("num_threads"),
              py::arg("isa") = "");
    };
    def("deform_attn_cpu", bind_forward, py::arg("output"));
    def("deform_attn_backward_cpu", bind_backward, py::arg("grad_output"), py::arg("gradients"));
    def("deform_attn_second_cpu",
        bind_second,
        py::arg("grad_output"),
        py::arg("cotangents"),
        py::arg("gradients"));
}

}  // namespace pyfeat
