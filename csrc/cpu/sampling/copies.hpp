// SPDX-License-Identifier: Apache-2.0
// Rows that lie apart in memory to rows side by side, and back. Compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/sampling/lanes.hpp"
#include "cpu/simd/elements.hpp"
#include "params.hpp"

namespace {

template <typename Element, typename Real>
void load_rows_of(const void* first,
                  std::int64_t stride,
                  std::int64_t num_rows,
                  std::int64_t dim,
                  Real* values,
                  std::int64_t width) {
    // A row takes less time than it takes to arrive, and processors do not foresee long strides.
    constexpr std::int64_t kRowsAhead = 16, kLine = 64;
    const auto* row = static_cast<const char*>(first);
    const std::int64_t num_bytes = dim * static_cast<std::int64_t>(sizeof(Element));
    for (std::int64_t r = 0; r < num_rows; ++r, row += stride, values += width) {
        for (std::int64_t i = 0; i < num_bytes && r + kRowsAhead < num_rows; i += kLine) {
            PYFEAT_PREFETCH(row + kRowsAhead * stride + i);
        }
        if constexpr (sizeof(Element) == sizeof(Real)) {
            const auto* from = reinterpret_cast<const Real*>(row);
            using L = Lanes<Real>;
            const std::int64_t rest = for_blocks<Real>(0, dim, [&](std::int64_t d, auto vectors) {
                PYFEAT_UNROLL
                for (int v = 0; v < decltype(vectors)::value; ++v) {
                    L::to(values + d + v * L::kCount, L::from(from + d + v * L::kCount));
                }
            });
            std::copy(from + rest, from + dim, values + rest);
        } else {
            const auto* from = reinterpret_cast<const Element*>(row);
            for (std::int64_t d = 0; d < dim; ++d) {
                values[d] = static_cast<Real>(static_cast<double>(from[d]));
            }
        }
    }
}

template <typename Real>
void load_rows(const void* first,
               pyfeat::Dtype dtype,
               std::int64_t stride,
               std::int64_t num_rows,
               std::int64_t dim,
               Real* values,
               std::int64_t width) {
    const auto load = [&](auto element) {
        load_rows_of<decltype(element)>(first, stride, num_rows, dim, values, width);
    };
    switch (dtype) {
        case pyfeat::Dtype::kFloat32:
            return load(Float32{});
        case pyfeat::Dtype::kFloat64:
            return load(Float64{});
        case pyfeat::Dtype::kFloat16:
            return load(Float16{});
        case pyfeat::Dtype::kBfloat16:
            return load(Bfloat16{});
    }
}

// Past the caches where rows allow it, as nobody reads them soon; lines that are written whole need
// not be read before.
template <typename Real>
void store_rows(const Real* values,
                std::int64_t width,
                std::int64_t num_rows,
                std::int64_t dim,
                Real* to,
                std::int64_t stride) {
    if constexpr (std::is_same_v<Real, float>) {
        constexpr std::uintptr_t kLine = 64;
        constexpr std::int64_t kFloats = 16;
        if (reinterpret_cast<std::uintptr_t>(to) % kLine == 0 && stride % kFloats == 0 &&
            dim % kFloats == 0) {
            for (std::int64_t r = 0; r < num_rows; ++r) {
                for (std::int64_t d = 0; d < dim; d += kLanes) {
                    store_past_caches(to + r * stride + d, load_unaligned(values + r * width + d));
                }
            }
            return;
        }
    }
    for (std::int64_t r = 0; r < num_rows; ++r) {
        std::copy_n(values + r * width, dim, to + r * stride);
    }
}

}  // namespace
