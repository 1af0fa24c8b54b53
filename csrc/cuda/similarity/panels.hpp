// SPDX-License-Identifier: Apache-2.0
// How matrices are packed for tile products: as the shared memory of a block wants them, so that
// contiguous copies fill it and nothing is checked or moved on the way.
//
// Rows come in panels of 128, columns in blocks of 64 bfloat16 values. A block of a panel is 128
// lines of 128 bytes; line r has its eight 16-byte pieces in the order piece ^ (r % 8): the layout
// that ldmatrix reads without bank conflicts and that wgmma calls a swizzle of 128 bytes. A panel
// has its blocks one after another. Rows and columns that fill up the last panel and block are
// zero.
#pragma once

#include <cstdint>

#include "host_device.hpp"

namespace pyfeat::cuda {

constexpr int kPanelRows = 128;
constexpr int kBlockColumns = 64;
constexpr int kPieceColumns = 8;  // 16 bytes
constexpr int kLineBytes = 128;
constexpr int kPanelBlockBytes = kPanelRows * kLineBytes;  // 16 KiB

PYFEAT_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t count, std::int64_t size) {
    return (count + size - 1) / size;
}

// Blocks of a row of so many columns; at least one.
PYFEAT_HOST_DEVICE constexpr std::int64_t num_blocks_of(std::int64_t dim) {
    return dim < 1 ? 1 : ceil_div(dim, kBlockColumns);
}

// Where piece `piece` of line `line` of a block lies, in bytes.
PYFEAT_HOST_DEVICE constexpr int swizzled_piece(int line, int piece) {
    return line * kLineBytes + ((piece ^ (line & 7)) << 4);
}

// Where a value lies in the packed matrix, in values.
PYFEAT_HOST_DEVICE constexpr std::int64_t packed_offset(std::int64_t row,
                                                        std::int64_t column,
                                                        std::int64_t num_blocks) {
    const std::int64_t panel = row / kPanelRows, block = column / kBlockColumns;
    const int line = static_cast<int>(row % kPanelRows);
    const int within = static_cast<int>(column % kBlockColumns);
    return ((panel * num_blocks + block) * kPanelBlockBytes +
            swizzled_piece(line, within / kPieceColumns)) /
               2 +
           within % kPieceColumns;
}

// A matrix of bfloat16 in packed form.
struct Panels {
    const std::uint16_t* values;  // [panels, blocks, 128, 64], 128-byte aligned
    std::int32_t num_panels;
    std::int32_t num_blocks;
};

}  // namespace pyfeat::cuda
