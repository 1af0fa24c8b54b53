// SPDX-License-Identifier: Apache-2.0
// The arguments of deformable attention as Python hands them to the compiled modules.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

#include "check.hpp"
#include "python_arguments.hpp"

namespace pyfeat {

using Size = std::int64_t;

// Address, dtype, strides of B, S, H.
using PyValue = std::tuple<std::uintptr_t, Dtype, Size, Size, Size>;
// B, S, H, D, Q
using PySizes = std::array<Size, 5>;
// Dimensions, shapes, points of each level, border, align_corners, discrete, softmax.
using PyLevels = std::tuple<int, std::vector<Size>, std::vector<Size>, bool, bool, bool, bool>;
// Address, strides of B, Q, H.
using PyPoints = std::tuple<std::uintptr_t, Size, Size, Size>;
// Of arrays by the values, the locations and the weights.
using PyAddresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

inline DeformAttnParams to_params(const PyValue& value,
                                  const PySizes& sizes,
                                  const PyLevels& levels,
                                  const PyPoints& locations,
                                  const PyPoints& weights) {
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
            to_pointer<void>(address),
            dtype,
            {batch_stride, cell_stride, head_stride},
            num_dims,
            shapes,
            num_points,
            border,
            align_corners,
            discrete,
            softmax,
            to_pointer<void>(std::get<0>(locations)),
            {std::get<1>(locations), std::get<2>(locations), std::get<3>(locations)},
            to_pointer<void>(std::get<0>(weights)),
            {std::get<1>(weights), std::get<2>(weights), std::get<3>(weights)}};
}

inline DeformAttnGradients to_gradients(std::uintptr_t upstream, const PyAddresses& gradients) {
    return {to_pointer<void>(upstream),
            to_pointer<void>(std::get<0>(gradients)),
            to_pointer<void>(std::get<1>(gradients)),
            to_pointer<void>(std::get<2>(gradients))};
}

}  // namespace pyfeat
