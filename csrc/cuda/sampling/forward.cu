// SPDX-License-Identifier: Apache-2.0
// Deformable attention: weighted sums of values at fractional positions of levels.
//
// A team of threads takes a row, each of them 16 bytes of its channels, in registers until the end.
// Of each point one thread finds the place, and all read up to 2^n corners. With logits the softmax
// is taken on the way; weights are never stored.
#include "cuda/sampling/channels.cuh"
#include "cuda/sampling/dispatch.cuh"
#include "cuda/sampling/rows.cuh"

namespace pyfeat::cuda {
namespace {

// sums[.] += what a point of a level weighs times its value there.
template <int kWidth, typename T, typename Real, int kDims>
__device__ inline void add_sample(const Sample<Real, kDims>& sample,
                                  const Level& level,
                                  const T* level_value,
                                  std::int32_t cell_bytes,
                                  Real (&sums)[kWidth]) {
    constexpr int kCorners = 1 << kDims;
    Channels<T, kWidth> values[kCorners];
    Real factors[kCorners];
#pragma unroll
    for (int e = 0; e < kCorners; ++e) {
        const bool inside = has_corner(sample.corners, e);
        factors[e] = inside ? sample.weight * corner_share<kDims>(sample.above, e) : Real{0};
        values[e] = {};
        if (inside) {
            values[e] = Channels<T, kWidth>::load(
                at_cell(level_value, sample.cell + corner_offset<kDims>(level, e), cell_bytes));
        }
    }
#pragma unroll
    for (int e = 0; e < kCorners; ++e) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            sums[i] = std::fma(factors[e], values[e][i], sums[i]);
        }
    }
}

template <typename T, int kWidth, int kDims>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    gather_kernel(const __grid_constant__ Sampling sampling,
                  const __grid_constant__ QueryBlocks blocks,
                  T* output) {  // [B, Q, H, D]
    using Real = RealOf<T>;
    const int team = blocks.team;
    const Row row = row_of_thread(sampling, blocks);
    const Points<Real, kDims> points(sampling, row, team);
    const T* value = static_cast<const T*>(sampling.value) + row.batch * sampling.batch_stride +
                     row.head * sampling.head_stride;
    for (int first = 0; first < sampling.dim; first += team * kWidth) {
        const int channel = first + row.lane * kWidth;
        const bool reads = channel < sampling.dim;
        Real sums[kWidth]{};
        std::int32_t first_cell = 0;
        for (int l = 0, first_point = 0; l < sampling.levels.count; ++l) {
            const Level& level = sampling.levels.items[l];
            const T* level_value = at_cell(value, first_cell, sampling.cell_bytes) + channel;
            for (int done = 0; done < level.num_points; done += team) {
                const int own = done + row.lane, t = first_point + own;
                const Spot<Real, kDims> spot =
                    points.spot(t, own < level.num_points, level, sampling.modes);
                const Real weight = spot.corners != 0 ? points.weight(t) : Real{0};
                const int rest = level.num_points - done, count = rest < team ? rest : team;
                for (int owner = 0; owner < count; ++owner) {
                    Sample<Real, kDims> sample(spot, weight, owner, team);
                    sample.corners = reads ? sample.corners : 0;
                    add_sample<kWidth>(sample, level, level_value, sampling.cell_bytes, sums);
                }
            }
            first_point += level.num_points;
            first_cell += level.num_cells();
        }
        if (reads && row.live) {
            store_channels<T, kWidth>(output + row.index(sampling) * sampling.dim + channel, sums);
        }
    }
}

}  // namespace

void gather(const DeformAttnParams& params, void* output, const Site& site) {
    for_kernel(params, output, [&](auto element, auto width, auto dims) {
        using T = decltype(element);
        const Sampling sampling = to_sampling(params);
        const QueryBlocks blocks = query_blocks(params, width);
        launch(site,
               launch_of(params, blocks),
               gather_kernel<T, decltype(width)::value, decltype(dims)::value>,
               sampling,
               blocks,
               static_cast<T*>(output));
    });
}

}  // namespace pyfeat::cuda
