// SPDX-License-Identifier: Apache-2.0
#include "cuda/sampling/layout.hpp"

#include <algorithm>

#include "check.hpp"

namespace pyfeat::cuda {
namespace {

// Threads of a block; fewer where there are too few for all processors.
constexpr int kThreads = 256;
constexpr int kFewThreads = 64;
constexpr std::int64_t kManyThreads = 1 << 17;

constexpr std::int64_t kMaxCells = 1 << 30;  // numbers of cells stay in 32 bits past the border

Levels to_levels(const DeformAttnParams& params) {
    PYFEAT_CHECK(params.num_points.size() <= kMaxLevels,
                 "deform_attn: a launch takes at most ",
                 kMaxLevels,
                 " levels, got ",
                 params.num_points.size());
    Levels levels{};
    levels.count = static_cast<std::int32_t>(params.num_points.size());
    const auto num_dims = static_cast<std::size_t>(params.num_dims);
    for (std::size_t l = 0; l < params.num_points.size(); ++l) {
        Level& level = levels.items[l];
        PYFEAT_CHECK(params.num_points[l] <= INT32_MAX,
                     "deform_attn: points of a level must be fewer than 2^31, got ",
                     params.num_points[l]);
        level.num_points = static_cast<std::int32_t>(params.num_points[l]);
        for (std::size_t j = 0; j < kMaxDims; ++j) {
            const std::int64_t size =
                j < num_dims ? params.shapes[(l + 1) * num_dims - 1 - j] : std::int64_t{1};
            PYFEAT_CHECK(
                size < kMaxCells, "deform_attn: spatial_shapes must be below 2^30, got ", size);
            level.sizes[j] = static_cast<std::int32_t>(size);
        }
    }
    return levels;
}

}  // namespace

Sampling to_sampling(const DeformAttnParams& params) {
    PYFEAT_CHECK(params.num_cells < kMaxCells,
                 "deform_attn: value must have fewer than 2^30 cells, S, got ",
                 params.num_cells);
    const std::int64_t bytes = params.dtype == Dtype::kFloat64 ? 8 : 4;  // of sums
    const std::int64_t apart = std::max(params.value_strides[1], params.heads * params.dim) * bytes;
    PYFEAT_CHECK(apart <= INT32_MAX,
                 "deform_attn: value must have cells less than 2^31 bytes apart, got ",
                 apart);
    std::int64_t num_points = 0;
    for (const std::int64_t count : params.num_points) {
        num_points += count;
    }
    PYFEAT_CHECK(num_points <= INT32_MAX,
                 "deform_attn: points of a query must be fewer than 2^31, got ",
                 num_points);
    Sampling sampling{};
    sampling.num_queries = params.num_queries;
    sampling.num_heads = params.heads;
    sampling.num_cells = static_cast<std::int32_t>(params.num_cells);
    sampling.dim = static_cast<std::int32_t>(params.dim);
    sampling.num_points = static_cast<std::int32_t>(num_points);
    sampling.value = params.value;
    sampling.batch_stride = params.value_strides[0];
    sampling.cell_bytes =
        static_cast<std::int32_t>(params.value_strides[1] * bytes_of(params.dtype));
    sampling.head_stride = params.value_strides[2];
    sampling.locations = params.locations;
    sampling.weights = params.weights;
    std::copy_n(params.location_strides, 3, sampling.location_strides);
    std::copy_n(params.weight_strides, 3, sampling.weight_strides);
    sampling.modes = {params.border, params.align_corners, params.discrete, params.softmax};
    sampling.levels = to_levels(params);
    return sampling;
}

bool has_wide_rows(const DeformAttnParams& params, const void* features) {
    const std::int64_t bytes = bytes_of(params.dtype);
    std::int64_t odd = params.dim * bytes;
    for (const void* address : {params.value, features}) {
        odd |= static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(address));
    }
    for (const std::int64_t stride : params.value_strides) {
        odd |= stride * bytes;
    }
    return odd % 16 == 0;
}

int team_of(const DeformAttnParams& params, int width) {
    int team = 1;
    while (team < 32 && std::int64_t{team} * width < params.dim) {
        team *= 2;
    }
    return team;
}

QueryBlocks query_blocks(const DeformAttnParams& params, int width) {
    QueryBlocks blocks{};
    blocks.team = team_of(params, width);
    const std::int64_t num_threads = params.batch * params.heads * params.num_queries * blocks.team;
    blocks.num_queries = (num_threads < kManyThreads ? kFewThreads : kThreads) / blocks.team;
    blocks.count = (params.num_queries + blocks.num_queries - 1) / blocks.num_queries;
    blocks.tile = query_tile(blocks.num_queries, params.num_dims);
    blocks.tiled = params.num_dims > 1 && params.num_queries == params.num_cells;
    if (blocks.tiled) {
        const Levels levels = to_levels(params);
        blocks.count = 0;
        for (std::int32_t l = 0; l < levels.count; ++l) {
            blocks.count += num_tiles(levels.items[l], blocks.tile);
        }
    }
    return blocks;
}

Launch launch_of(const DeformAttnParams& params, const QueryBlocks& blocks) {
    const std::int64_t count = blocks.count * params.heads * params.batch;
    PYFEAT_CHECK(
        count <= INT32_MAX, "deform_attn: blocks of queries must be fewer than 2^31, got ", count);
    return {dim3(static_cast<unsigned>(count)),
            dim3(static_cast<unsigned>(blocks.team * blocks.num_queries))};
}

}  // namespace pyfeat::cuda
