// SPDX-License-Identifier: Apache-2.0
// Features of every dtype, widened to float64 without loss, and distances by direct differences.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/device/warp.cuh"
#include "host_device.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

template <typename To, typename From>
PYFEAT_HOST_DEVICE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

struct Bfloat16 {
    std::uint16_t bits;
    PYFEAT_HOST_DEVICE explicit operator double() const {
        return static_cast<double>(bits_as<float>(static_cast<std::uint32_t>(bits) << 16));
    }
};

struct Float16 {
    std::uint16_t bits;
    PYFEAT_HOST_DEVICE explicit operator double() const {
        const std::uint32_t sign = (bits & 0x8000U) << 16, rest = (bits & 0x7FFFU) << 13;
        // Exponents differ by 112; the product also makes normal numbers of subnormal ones.
        const float scaled = bits_as<float>(rest) * 0x1p112F;
        // Infinity and NaN have come out as numbers from 2^16 on.
        const std::uint32_t magnitude =
            scaled < 0x1p16F ? bits_as<std::uint32_t>(scaled) : rest | 0x7F800000U;
        return static_cast<double>(bits_as<float>(sign | magnitude));
    }
};

// The nearest bfloat16, ties to even. Not for NaN.
PYFEAT_HOST_DEVICE inline Bfloat16 to_bfloat16(float value) {
    const auto bits = bits_as<std::uint32_t>(value);
    return {static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16)};
}

// Calls work(feature) with a value of the C++ type of the dtype.
template <typename Work>
void with_feature_type(Dtype dtype, Work work) {
    switch (dtype) {
        case Dtype::kFloat32:
            return work(float{});
        case Dtype::kFloat64:
            return work(double{});
        case Dtype::kFloat16:
            return work(Float16{});
        case Dtype::kBfloat16:
            return work(Bfloat16{});
    }
}

// A matrix of features in device memory.
template <typename Feature>
struct FeatureRows {
    const Feature* data;  // [rows, D]
    std::int64_t stride;  // from one row to the next
    std::int64_t dim;     // D

    PYFEAT_HOST_DEVICE const Feature* row(std::int64_t index) const {
        return data + index * stride;
    }
};

template <typename Feature>
FeatureRows<Feature> feature_rows(const Rows& rows) {
    return {static_cast<const Feature*>(rows.data), rows.stride, rows.dim};
}

// 1 / ||x||, and 0 for a row of zeros; of a warp.
template <typename Feature>
__device__ double unit_factor(const Feature* row, std::int64_t dim, int lane) {
    double squared = 0.0;
    for (std::int64_t d = lane; d < dim; d += 32) {
        const double x = static_cast<double>(row[d]);
        squared = fma(x, x, squared);
    }
    squared = warp_sum(squared);
    return squared > 0.0 ? 1.0 / sqrt(squared) : 0.0;
}

// What a metric ranks by, of a warp: the less the nearer. Equal rows get equal bits. Factors are
// those of cosine, else 1.
template <typename Feature>
__device__ double row_key(const Feature* query,
                          const Feature* row,
                          std::int64_t dim,
                          Metric metric,
                          double query_factor,
                          double row_factor,
                          int lane) {
    double sum = 0.0;
    if (metric == Metric::kInnerProduct) {
#pragma unroll 4
        for (std::int64_t d = lane; d < dim; d += 32) {
            sum = fma(-static_cast<double>(query[d]), static_cast<double>(row[d]), sum);
        }
        return warp_sum(sum);
    }
    if (metric != Metric::kCosine) {
#pragma unroll 4
        for (std::int64_t d = lane; d < dim; d += 32) {
            const double difference = static_cast<double>(query[d]) - static_cast<double>(row[d]);
            sum = fma(difference, difference, sum);
        }
        return warp_sum(sum);
    }
#pragma unroll 4
    for (std::int64_t d = lane; d < dim; d += 32) {
        const double difference =
            static_cast<double>(query[d]) * query_factor - static_cast<double>(row[d]) * row_factor;
        sum = fma(difference, difference, sum);
    }
    sum = warp_sum(sum);
    // 1 - cos = ||q/|q| - x/|x|||^2 / 2 keeps its digits for near-parallel vectors; the angle to a
    // zero vector counts as a right one.
    return query_factor == 0.0 || row_factor == 0.0 ? 1.0 : 0.5 * sum;
}

}  // namespace pyfeat::cuda
