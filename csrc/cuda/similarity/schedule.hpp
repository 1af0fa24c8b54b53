// SPDX-License-Identifier: Apache-2.0
// Which thread block multiplies which tiles, and in which order.
//
// The product A B^T is cut into tiles of 128 rows. A task is a block of rows and a range of column
// tiles, one after another, so that what an epilogue knows of its rows stays in registers between
// them. Tasks that run at the same time are those of few row blocks and few ranges, whose operands
// the second-level cache holds: kSweep row blocks go through all ranges before the next do.
#pragma once

#include <cstdint>

#include "cuda/similarity/panels.hpp"
#include "host_device.hpp"

namespace pyfeat::cuda {

constexpr int kTileRows = kPanelRows;

struct TileTask {
    std::int32_t row_block;
    std::int32_t range;
};

struct TileSchedule {
    std::int32_t row_blocks;
    std::int32_t column_tiles;  // that are multiplied
    std::int32_t tile_step;     // 1: all of B; s: every s-th tile
    std::int32_t range_tiles;   // tiles of a range; the last may have fewer
    std::int32_t ranges;
    // 0: all tiles; else rows and columns are the same, in panels, a tile has so many of them in
    // its columns, and tiles left of the diagonal are not multiplied.
    std::int32_t diagonal_panels = 0;

    static constexpr int kSweep = 8;

    PYFEAT_HOST_DEVICE std::int64_t num_tasks() const {
        return static_cast<std::int64_t>(row_blocks) * ranges;
    }
    PYFEAT_HOST_DEVICE TileTask task(std::int64_t index) const {
        const std::int64_t per_sweep = static_cast<std::int64_t>(kSweep) * ranges;
        const std::int64_t first = index / per_sweep * kSweep, within = index % per_sweep;
        const std::int64_t left = row_blocks - first;
        const std::int64_t height = left < kSweep ? left : kSweep;
        return {static_cast<std::int32_t>(first + within % height),
                static_cast<std::int32_t>(within / height)};
    }
    // The first tile of a range that is multiplied for these rows; range_end or more: none is.
    PYFEAT_HOST_DEVICE std::int32_t range_begin(const TileTask& task) const {
        const std::int32_t begin = task.range * range_tiles;
        const std::int32_t diagonal = diagonal_panels == 0 ? 0 : task.row_block / diagonal_panels;
        return begin < diagonal ? diagonal : begin;
    }
    // One past the last tile of a range.
    PYFEAT_HOST_DEVICE std::int32_t range_end(std::int32_t range) const {
        const std::int32_t end = (range + 1) * range_tiles;
        return end < column_tiles ? end : column_tiles;
    }
};

// Tasks for `workers` thread blocks: about eight for each, so that none waits long for the last, of
// at most `most_tiles` tiles. tile_columns is a multiple of 128.
inline TileSchedule plan_tiles(std::int64_t row_panels,
                               std::int64_t column_panels,
                               std::int64_t tile_columns,
                               std::int64_t tile_step,
                               std::int64_t workers,
                               std::int64_t most_tiles = 16) {
    const std::int64_t tiles =
        ceil_div(ceil_div(column_panels * kPanelRows, tile_columns), tile_step);
    std::int64_t length = row_panels * tiles / (8 * workers);
    length = length < 1 ? 1 : (length > most_tiles ? most_tiles : length);
    return {static_cast<std::int32_t>(row_panels),
            static_cast<std::int32_t>(tiles),
            static_cast<std::int32_t>(tile_step),
            static_cast<std::int32_t>(length),
            static_cast<std::int32_t>(ceil_div(tiles, length))};
}

// The blocks of the tiles of the tasks of one thread block, in order.
class TileCursor {
  public:
    PYFEAT_HOST_DEVICE TileCursor(const TileSchedule& schedule,
                                  std::int64_t first_task,
                                  std::int64_t task_step,
                                  std::int32_t num_blocks)
        : schedule_(schedule), task_(first_task), step_(task_step), num_blocks_(num_blocks) {
        begin_task();
    }

    PYFEAT_HOST_DEVICE bool done() const {
        return task_ >= schedule_.num_tasks();
    }
    PYFEAT_HOST_DEVICE std::int32_t row_block() const {
        return current_.row_block;
    }
    PYFEAT_HOST_DEVICE std::int32_t range() const {
        return current_.range;
    }
    PYFEAT_HOST_DEVICE std::int32_t column_tile() const {
        return tile_ * schedule_.tile_step;
    }
    PYFEAT_HOST_DEVICE std::int32_t block() const {
        return block_;
    }
    PYFEAT_HOST_DEVICE bool starts_task() const {
        return block_ == 0 && tile_ == schedule_.range_begin(current_);
    }
    PYFEAT_HOST_DEVICE bool ends_tile() const {
        return block_ == num_blocks_ - 1;
    }
    PYFEAT_HOST_DEVICE bool is_last_tile() const {
        return tile_ == end_ - 1;
    }
    PYFEAT_HOST_DEVICE void next() {
        if (++block_ == num_blocks_) {
            next_tile();
        }
    }
    // The first block of the next tile.
    PYFEAT_HOST_DEVICE void next_tile() {
        block_ = 0;
        if (++tile_ == end_) {
            task_ += step_;
            begin_task();
        }
    }

  private:
    PYFEAT_HOST_DEVICE void begin_task() {
        for (; !done(); task_ += step_) {
            current_ = schedule_.task(task_);
            tile_ = schedule_.range_begin(current_);
            end_ = schedule_.range_end(current_.range);
            if (tile_ < end_) {
                return;
            }
        }
    }

    const TileSchedule& schedule_;
    std::int64_t task_, step_;
    std::int32_t num_blocks_;
    TileTask current_{0, 0};
    std::int32_t tile_ = 0, end_ = 0, block_ = 0;
};

}  // namespace pyfeat::cuda
