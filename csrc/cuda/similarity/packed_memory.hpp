// SPDX-License-Identifier: Apache-2.0
// A range of memory rows as the search reads them, in one piece of device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/similarity/bounds.hpp"
#include "cuda/similarity/panels.hpp"
#include "host_device.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

// Rows are dealt to tiles one by one, so that every tile is an even sample of all rows: slot s
// holds row first + s % 256 * tiles + s / 256. Slots past the last row are filled up.
struct RowMap {
    static constexpr std::int64_t kTileSlots = 2 * kPanelRows;

    std::int64_t first, end;  // rows
    std::int64_t tiles;       // of 256 slots

    PYFEAT_HOST_DEVICE std::int64_t row(std::int64_t slot) const {
        return first + slot % kTileSlots * tiles + slot / kTileSlots;
    }
    PYFEAT_HOST_DEVICE std::int64_t num_slots() const {
        return tiles * kTileSlots;
    }
};

inline RowMap map_rows(std::int64_t first, std::int64_t end) {
    return {first, end, ceil_div(end - first, RowMap::kTileSlots)};
}

// Cuts a piece of memory into arrays, each 256-byte aligned. Without memory it only counts.
class Carver {
  public:
    explicit Carver(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

    template <typename T>
    T* take(std::int64_t count) {
        char* taken = memory_ == nullptr ? nullptr : memory_ + bytes_;
        bytes_ += ceil_div(count * static_cast<std::int64_t>(sizeof(T)), kAlignment) * kAlignment;
        return reinterpret_cast<T*>(taken);
    }
    std::int64_t bytes() const {
        return bytes_;
    }

  private:
    static constexpr std::int64_t kAlignment = 256;
    char* memory_;
    std::int64_t bytes_ = 0;
};

struct PackedMemory {
    RowMap map;
    std::int32_t num_blocks;
    std::uint16_t* values;  // [slots / 128, blocks, 128, 64]
    RowTerms* terms;        // [slots]
    RowTerms* panel_terms;  // [slots / 128], the largest of a panel; score is not used
    float* scores;          // [slots], those of the terms
    double* factors;        // [slots], 1 / ||x|| for cosine, 0 for a row of zeros

    PYFEAT_HOST_DEVICE Panels panels() const {
        return {values, static_cast<std::int32_t>(map.num_slots() / kPanelRows), num_blocks};
    }
};

inline PackedMemory carve_memory(const RowMap& map, std::int64_t dim, Carver& carver) {
    const std::int64_t slots = map.num_slots(), blocks = num_blocks_of(dim);
    PackedMemory packed{
        map, static_cast<std::int32_t>(blocks), nullptr, nullptr, nullptr, nullptr, nullptr};
    packed.values = carver.take<std::uint16_t>(slots * blocks * kBlockColumns);
    packed.terms = carver.take<RowTerms>(slots);
    packed.panel_terms = carver.take<RowTerms>(slots / kPanelRows);
    packed.scores = carver.take<float>(slots);
    packed.factors = carver.take<double>(slots);
    return packed;
}

// Coordinates in which rows are packed: (x - mean) scale; for cosine, x is divided by its norm
// before.
struct DeviceFrame {
    const double* mean;   // [D]
    const double* scale;  // [1]
    const double* shift;  // [1], the norm of the scaled mean for the inner product, else 0
};

}  // namespace pyfeat::cuda
