// SPDX-License-Identifier: Apache-2.0
// Gradients of deformable attention by values, locations and weights.
//
// With A the weights, f the values at the points and G the upstream gradient, dA = <G, f> and du =
// A <G, df/du>: of each point a thread multiplies its channels of the corners with G once, weighs
// the products by the shares and their derivatives, and the team adds up n + 1 numbers. A G times
// the shares is added to the gradient by values, 16 bytes at a time, in no fixed order. Of logits z
// dz = A (dA - <A, dA>): the sum comes about on the way, and a pass without values does the rest.
#include "cuda/sampling/channels.cuh"
#include "cuda/sampling/deform_attn.hpp"
#include "cuda/sampling/dispatch.cuh"
#include "cuda/sampling/rows.cuh"

namespace pyfeat::cuda {
namespace {

// Contiguous; null where not wanted.
template <typename Real>
struct Gradients {
    Real* value;      // [B, S, H, D]
    Real* locations;  // [B, Q, H, T, n]
    Real* weights;    // [B, Q, H, T]
};

// By the weight of a point before the softmax, and by its position, of some channels.
template <typename Real, int kDims>
struct ByPoint {
    Real weight, position[kDims];
};

// <grad, f> and <grad, df/du> of a point of a level, over the channels of a team.
template <int kWidth, typename T, typename Real, int kDims>
__device__ inline ByPoint<Real, kDims> products(const Sample<Real, kDims>& sample,
                                                const Level& level,
                                                const T* level_value,
                                                std::int32_t cell_bytes,
                                                const Real (&grad)[kWidth],
                                                int team) {
    constexpr int kCorners = 1 << kDims;
    Channels<T, kWidth> values[kCorners];
#pragma unroll
    for (int e = 0; e < kCorners; ++e) {
        values[e] = {};
        if (has_corner(sample.corners, e)) {
            values[e] = Channels<T, kWidth>::load(
                at_cell(level_value, sample.cell + corner_offset<kDims>(level, e), cell_bytes));
        }
    }
    ByPoint<Real, kDims> by{};
#pragma unroll
    for (int e = 0; e < kCorners; ++e) {
        Real dot{0};
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            dot = std::fma(grad[i], values[e][i], dot);
        }
        by.weight = std::fma(corner_share<kDims>(sample.above, e), dot, by.weight);
#pragma unroll
        for (int j = 0; j < kDims; ++j) {
            by.position[j] = std::fma(corner_share<kDims>(sample.above, e, j), dot, by.position[j]);
        }
    }
    by.weight = sum_of_team(by.weight, team);
#pragma unroll
    for (int j = 0; j < kDims; ++j) {
        by.position[j] = sum_of_team(by.position[j], team);
    }
    return by;
}

// Adds what a point weighs times the gradient to its corners.
template <int kWidth, typename Real, int kDims>
__device__ inline void scatter(const Sample<Real, kDims>& sample,
                               const Level& level,
                               Real* level_gradient,
                               std::int32_t cell_bytes,
                               const Real (&grad)[kWidth]) {
#pragma unroll
    for (int e = 0; e < 1 << kDims; ++e) {
        if (has_corner(sample.corners, e)) {
            const Real factor = sample.weight * corner_share<kDims>(sample.above, e);
            Real added[kWidth];
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                added[i] = factor * grad[i];
            }
            add_channels(
                at_cell(level_gradient, sample.cell + corner_offset<kDims>(level, e), cell_bytes),
                added);
        }
    }
}

// What the owner of point t has of it, to global memory; of later channels to what is there.
template <typename Real, int kDims>
__device__ inline void write_point(const Gradients<Real>& gradients,
                                   const Spot<Real, kDims>& spot,
                                   const ByPoint<Real, kDims>& by,
                                   Real weight,
                                   bool adds,
                                   std::int64_t t) {
    const bool there = spot.corners != 0;
    if (gradients.weights != nullptr) {
        Real* at = gradients.weights + t;
        *at = (there ? by.weight : Real{0}) + (adds ? *at : Real{0});
    }
    if (gradients.locations != nullptr) {
#pragma unroll
        for (int j = 0; j < kDims; ++j) {
            Real* at = gradients.locations + t * kDims + j;
            const Real slope = weight * spot.slopes[j] * by.position[j];
            *at = (there ? slope : Real{0}) + (adds ? *at : Real{0});
        }
    }
}

template <typename T, int kWidth, int kDims>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    gradients_kernel(const __grid_constant__ Sampling sampling,
                     const __grid_constant__ QueryBlocks blocks,
                     const T* upstream,  // [B, Q, H, D]
                     const __grid_constant__ Gradients<RealOf<T>> gradients) {
    using Real = RealOf<T>;
    const int team = blocks.team;
    const Row row = row_of_thread(sampling, blocks);
    const Points<Real, kDims> points(sampling, row, team);
    const std::int64_t row_index = row.index(sampling), row_point = row_index * sampling.num_points;
    const bool by_points = gradients.locations != nullptr || gradients.weights != nullptr;
    const T* value = static_cast<const T*>(sampling.value) + row.batch * sampling.batch_stride +
                     row.head * sampling.head_stride;
    // Cells of the gradient are as far apart as heads have channels.
    const auto gradient_bytes =
        static_cast<std::int32_t>(sampling.num_heads * sampling.dim * std::int64_t{sizeof(Real)});
    const std::int64_t gradient_at =
        (row.batch * sampling.num_cells * sampling.num_heads + row.head) * sampling.dim;
    Real mean{0};
    for (int first = 0; first < sampling.dim; first += team * kWidth) {
        const int channel = first + row.lane * kWidth;
        const bool reads = channel < sampling.dim && row.live;
        Channels<T, kWidth> loaded{};
        if (reads) {
            loaded = Channels<T, kWidth>::load(upstream + row_index * sampling.dim + channel);
        }
        Real grad[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            grad[i] = loaded[i];
        }
        std::int32_t first_cell = 0;
        for (int l = 0, first_point = 0; l < sampling.levels.count; ++l) {
            const Level& level = sampling.levels.items[l];
            const T* level_value = at_cell(value, first_cell, sampling.cell_bytes) + channel;
            Real* level_gradient =
                at_cell(gradients.value + gradient_at, first_cell, gradient_bytes) + channel;
            for (int done = 0; done < level.num_points; done += team) {
                const int own = done + row.lane, t = first_point + own;
                const bool owns = own < level.num_points && row.live;
                const Spot<Real, kDims> spot = points.spot(t, owns, level, sampling.modes);
                const bool there = spot.corners != 0;
                const Real weight = there ? points.weight(t) : Real{0};
                ByPoint<Real, kDims> by{};
                const int rest = level.num_points - done, count = rest < team ? rest : team;
                for (int owner = 0; owner < count; ++owner) {
                    Sample<Real, kDims> sample(spot, weight, owner, team);
                    sample.corners = reads ? sample.corners : 0;
                    if (by_points) {
                        const ByPoint<Real, kDims> found = products<kWidth>(
                            sample, level, level_value, sampling.cell_bytes, grad, team);
                        by = owner == row.lane ? found : by;
                    }
                    if (gradients.value != nullptr) {
                        scatter<kWidth>(sample, level, level_gradient, gradient_bytes, grad);
                    }
                }
                if (owns) {
                    write_point(gradients, spot, by, weight, first > 0, row_point + t);
                    mean = there ? std::fma(weight, by.weight, mean) : mean;
                }
            }
            first_point += level.num_points;
            first_cell += level.num_cells();
        }
    }
    if (sampling.modes.softmax && gradients.weights != nullptr) {
        mean = sum_of_team(mean, team);
        __syncwarp();  // what one thread of the team has written another reads
        for (int t = row.lane; row.live && t < sampling.num_points; t += team) {
            Real* at = gradients.weights + row_point + t;
            *at = points.weight(t) * (*at - mean);
        }
    }
}

}  // namespace

void gather_gradients(const DeformAttnParams& params,
                      const DeformAttnGradients& gradients,
                      const Site& site) {
    for_kernel(params, gradients.upstream, [&](auto element, auto width, auto dims) {
        using T = decltype(element);
        using Real = RealOf<T>;
        const QueryBlocks blocks = query_blocks(params, width);
        launch(site,
               launch_of(params, blocks),
               gradients_kernel<T, decltype(width)::value, decltype(dims)::value>,
               to_sampling(params),
               blocks,
               static_cast<const T*>(gradients.upstream),
               Gradients<Real>{static_cast<Real*>(gradients.value),
                               static_cast<Real*>(gradients.locations),
                               static_cast<Real*>(gradients.weights)});
    });
}

}  // namespace pyfeat::cuda
