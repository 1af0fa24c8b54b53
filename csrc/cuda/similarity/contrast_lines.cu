// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "cuda/similarity/lines.cuh"
#include "cuda/similarity/pair_tiles.cuh"

namespace pyfeat::cuda {
namespace {

dim3 blocks_of(std::int64_t count, std::int64_t size) {
    return dim3(static_cast<unsigned>(ceil_div(count, size)));
}

std::string lines(std::int64_t count) {
    return "[" + std::to_string(count) + "]";
}

}  // namespace

PackedShape packed_shape(Dtype dtype, std::int64_t num_rows, std::int64_t dim) {
    const std::int64_t columns = dtype == Dtype::kFloat32 ? kFloatColumns : kBlockColumns;
    // Wide tiles have two panels of columns: one may lie beyond the last, of whichever block.
    return {(ceil_div(num_rows, kPanelRows) + 1) * kPanelRows,
            ceil_div(dim < 1 ? 1 : dim, columns) * columns};
}

void pack_features(const Rows& features, void* packed, const Queue& queue) {
    const Site site{
        "pack_features",
        "[" + std::to_string(features.num_rows) + ", " + std::to_string(features.dim) + "]",
        queue};
    PYFEAT_CHECK(features.dtype != Dtype::kFloat64,
                 "pack_features: features must have 32 or 16 bits");
    const DeviceGuard guard(site);
    const PackedShape shape = packed_shape(features.dtype, features.num_rows, features.dim);
    const bool wide = features.dtype == Dtype::kFloat32;
    const std::int64_t num_blocks = shape.width / (wide ? kFloatColumns : kBlockColumns);
    const PackParams params{
        features.data, features.num_rows, features.dim, features.stride, packed, num_blocks};
    launch(site,
           {blocks_of(shape.num_rows / kPanelRows * num_blocks, 1), dim3(kLineThreads)},
           wide ? pack_float32_kernel : pack_16_bits_kernel,
           params);
}

PairPlan plan_pairs(const PackedPair& pair, const Queue& queue) {
    const Site site = site_of("pair_sums", pair, queue);
    const TileSchedule schedule = schedule_of(pair, site);
    const std::int64_t fragments = row_fragments(pair.dtype, site);
    return {schedule.ranges,
            schedule.ranges * fragments,
            schedule.row_blocks * (kPanelRows / 16 / fragments),
            schedule.num_tasks() * (kProductThreads / 32)};
}

PairTileShape pair_tile_shape(Dtype dtype, const Queue& queue) {
    const Site site{"pair_sums", "", queue};
    const std::int64_t fragments = row_fragments(dtype, site);
    const std::int64_t columns = tile_columns_of(dtype, site);
    return {kPanelRows, columns, fragments * kPanelRows + kPanelRows / 16 / fragments * columns};
}

void merge_sums(const MergeSumsCall& call, const Queue& queue) {
    const Site site{"pair_sums", "lines " + lines(call.num_lines), queue};
    const DeviceGuard guard(site);
    launch(site,
           {blocks_of(call.num_lines, kMergedLines), dim3(kMergedLines * kMergeWarps), kMergeBytes},
           merge_parts_kernel,
           call);
}

void gradient_terms(const GradientTermsCall& call, const Queue& queue) {
    const Site site{"pair_sums_backward", "lines " + lines(call.num_lines), queue};
    const DeviceGuard guard(site);
    launch(site,
           {blocks_of(call.num_lines, kLineThreads), dim3(kLineThreads)},
           gradient_terms_kernel,
           call);
}

}  // namespace pyfeat::cuda
