// SPDX-License-Identifier: Apache-2.0
// What the kernels of deformable attention begin with: which row, a query and a head of a batch, a
// team of threads takes, its softmax, and its points.
//
// A team is a power of two of at most 32 threads, which share the channels of a row. Each thread
// finds the place of every team-th point of a level, and hands it to the others.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/device/warp.cuh"
#include "cuda/sampling/sampling.hpp"
#include "sampling/levels.hpp"

namespace pyfeat::cuda {
namespace {

constexpr int kMaxThreads = 256;
// At least so many blocks on a processor: 128 registers, which no kernel needs, or it would spill.
constexpr int kMinBlocks = 2;

// One multiplication makes the address.
template <typename T>
__device__ inline T* at_cell(T* values, std::int32_t cell, std::int32_t cell_bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(values) + std::int64_t{cell} * cell_bytes);
}

struct Row {
    std::int64_t batch, query, head;
    bool live;  // whether there is one
    int lane;   // of the team

    // Of an array [B, Q, H, ...] with strides.
    __device__ std::int64_t offset(const std::int64_t (&strides)[3]) const {
        return batch * strides[0] + query * strides[1] + head * strides[2];
    }
    // Of a contiguous array [B, Q, H].
    __device__ std::int64_t index(const Sampling& sampling) const {
        return (batch * sampling.num_queries + query) * sampling.num_heads + head;
    }
};

// Blocks of one head of a batch follow each other: its values stay in the second-level cache.
__device__ inline Row row_of_thread(const Sampling& sampling, const QueryBlocks& blocks) {
    const std::int64_t slice = blockIdx.x / blocks.count, block = blockIdx.x % blocks.count;
    const int place = static_cast<int>(threadIdx.x) / blocks.team;
    std::int64_t query = block * blocks.num_queries + place;
    if (blocks.tiled) {
        query = query_of_tile(sampling.levels, blocks.tile, block, place);
    }
    Row row;
    row.live = query >= 0 && query < sampling.num_queries;
    row.query = row.live ? query : 0;
    row.batch = slice / sampling.num_heads;
    row.head = slice % sampling.num_heads;
    row.lane = static_cast<int>(threadIdx.x) % blocks.team;
    return row;
}

// The weight of a point is std::exp(logit - shift) factor.
template <typename Real>
struct Softmax {
    Real shift, factor;

    __device__ Real weight(Real logit) const {
        return std::exp(logit - shift) * factor;
    }
};

// Over the team, the same on all its threads.
template <typename Real>
__device__ inline Real sum_of_team(Real sum, int team) {
    for (int apart = team / 2; apart > 0; apart /= 2) {
        sum += __shfl_xor_sync(kWholeWarp, sum, apart);
    }
    return sum;
}

template <typename Real>
__device__ inline Softmax<Real> softmax_of(
    const Real* logits, bool live, int lane, int team, int num_points) {
    Real largest = -static_cast<Real>(INFINITY), sum{0};
    for (int t = lane; live && t < num_points; t += team) {
        largest = std::fmax(largest, logits[t]);
    }
    for (int apart = team / 2; apart > 0; apart /= 2) {
        largest = std::fmax(largest, __shfl_xor_sync(kWholeWarp, largest, apart));
    }
    // Infinite only if all are: their difference would not be a number.
    const Real shift = largest == -static_cast<Real>(INFINITY) ? Real{0} : largest;
    for (int t = lane; live && t < num_points; t += team) {
        sum += std::exp(logits[t] - shift);
    }
    return {shift, Real{1} / sum_of_team(sum, team)};
}

// The rows of a team with its weights, after the softmax if there is one.
template <typename Real, int kDims>
struct Points {
    const Real *locations, *weights;  // [T, n], [T]
    Softmax<Real> softmax;
    bool softmaxed, live;

    // Without the softmax of logits if points are only placed.
    __device__ Points(const Sampling& sampling, const Row& row, int team, bool weighs = true)
        : locations(static_cast<const Real*>(sampling.locations) +
                    row.offset(sampling.location_strides)),
          weights(static_cast<const Real*>(sampling.weights) + row.offset(sampling.weight_strides)),
          softmax{},
          softmaxed(sampling.modes.softmax && weighs),
          live(row.live) {
        if (softmaxed) {
            softmax = softmax_of(weights, live, row.lane, team, sampling.num_points);
        }
    }

    // Without corners if the row is not there.
    __device__ Spot<Real, kDims> spot(int t,
                                      bool wanted,
                                      const Level& level,
                                      const SamplingModes& modes) const {
        Spot<Real, kDims> spot{};
        if (wanted && live) {
            spot = spot_of<Real, kDims>(locations + std::int64_t{t} * kDims, level, modes);
        }
        return spot;
    }
    // Of a point that has corners.
    __device__ Real weight(int t) const {
        const Real given = weights[t];
        return softmaxed ? softmax.weight(given) : given;
    }
};

// What all threads of a team know of a point: its place and its weight.
template <typename Real, int kDims>
struct Sample {
    std::int32_t cell, corners;
    Real weight, above[kDims];

    __device__ Sample(const Spot<Real, kDims>& spot, Real given, int owner, int team)
        : cell(__shfl_sync(kWholeWarp, spot.cell, owner, team)),
          corners(__shfl_sync(kWholeWarp, spot.corners, owner, team)),
          weight(__shfl_sync(kWholeWarp, given, owner, team)) {
#pragma unroll
        for (int j = 0; j < kDims; ++j) {
            above[j] = __shfl_sync(kWholeWarp, spot.above[j], owner, team);
        }
    }
};

}  // namespace
}  // namespace pyfeat::cuda
