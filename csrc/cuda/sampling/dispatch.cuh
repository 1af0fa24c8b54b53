// SPDX-License-Identifier: Apache-2.0
// Which instance of a kernel of deformable attention a call takes.
#pragma once

#include <type_traits>

#include "cuda/device/convert.cuh"
#include "cuda/sampling/layout.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

// use(T{}, width), width a constant: channels, of values and of features [B, Q, H, D], are read 16
// bytes at a time or one by one.
template <typename Use>
void for_element(const DeformAttnParams& params, const void* features, Use use) {
    const auto for_width = [&](auto element) {
        constexpr int kWidth = 16 / static_cast<int>(sizeof(element));
        if (has_wide_rows(params, features)) {
            use(element, std::integral_constant<int, kWidth>{});
        } else {
            use(element, std::integral_constant<int, 1>{});
        }
    };
    switch (params.dtype) {
        case Dtype::kFloat32:
            return for_width(float{});
        case Dtype::kFloat16:
            return for_width(Float16{});
        case Dtype::kBfloat16:
            return for_width(Bfloat16{});
        case Dtype::kFloat64:
            return use(double{}, std::integral_constant<int, 1>{});
    }
}

// use(n), a constant.
template <typename Use>
void for_dims(const DeformAttnParams& params, Use use) {
    if (params.num_dims == 1) {
        use(std::integral_constant<int, 1>{});
    } else if (params.num_dims == 2) {
        use(std::integral_constant<int, 2>{});
    } else {
        use(std::integral_constant<int, 3>{});
    }
}

// use(T{}, width, n)
template <typename Use>
void for_kernel(const DeformAttnParams& params, const void* features, Use use) {
    for_element(params, features, [&](auto element, auto width) {
        for_dims(params, [&](auto dims) { use(element, width, dims); });
    });
}

}  // namespace pyfeat::cuda
