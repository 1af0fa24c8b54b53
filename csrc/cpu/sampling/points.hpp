// SPDX-License-Identifier: Apache-2.0
// The points of one query and head: their cells, and what these weigh. Arithmetic over all points
// at a time in plain loops, for compilers to turn into registers. Compiled once per instruction
// set.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/sampling/kernels.hpp"
#include "cpu/simd/power.hpp"
#include "cpu/simd/unroll.hpp"
#include "sampling/place.hpp"

namespace {

class Scratch {
  public:
    explicit Scratch(double* data) : next_(data) {}

    // Room for `count` values of at most 8 bytes, a multiple of 64 bytes from the start.
    template <typename T>
    T* take(std::int64_t count) {
        T* taken = reinterpret_cast<T*>(next_);
        next_ += count;
        return taken;
    }

  private:
    double* next_;
};

// Stands for the number of a cell, in all or along an axis, where there is none.
constexpr std::int32_t kNoCell = -1;

// use(t) for t in [0, slots), by blocks of a constant size.
template <typename Use>
PYFEAT_INLINE inline void for_slots(std::int64_t slots, Use use) {
    for (std::int64_t first = 0; first < slots; first += pyfeat::kPointBlock) {
        PYFEAT_INDEPENDENT
        for (std::int64_t i = 0; i < pyfeat::kPointBlock; ++i) {
            use(first + i);
        }
    }
}

// Arrays over the slots. Along each axis a point lies between a cell and the next, "low" and
// "high"; corner e takes the high one along the axes of the bits of e.
template <typename Real, int kDims, bool kDiscrete>
class Points {
  public:
    static constexpr int kCorners = kDiscrete ? 1 : 1 << kDims;

    Points(const pyfeat::PointTable<Real>& table, Scratch& scratch)
        : table_(table), num_slots_(table.num_slots), weights_(take<Real>(scratch)) {
        for (int j = 0; j < kDims; ++j) {
            coordinates_[j] = take<Real>(scratch);
            for (int side = 0; side < 2; ++side) {
                shares_[side][j] = take<Real>(scratch);
                slopes_[side][j] = take<Real>(scratch);
                offsets_[side][j] = take<std::int32_t>(scratch);
            }
            // No point: not to be changed where `locate` reads no location.
            for (std::int64_t t = 0; t < num_slots_; ++t) {
                coordinates_[j][t] = static_cast<Real>(NAN);
            }
        }
        for (std::int64_t t = 0; t < num_slots_; ++t) {
            weights_[t] = Real{0};
        }
        for (int e = 0; e < kCorners; ++e) {
            cells_[e] = take<std::int32_t>(scratch);
        }
    }

    std::int64_t num_points() const {
        return table_.num_points;
    }
    std::int64_t num_slots() const {
        return num_slots_;
    }
    // Attention weights, after the softmax if there is one.
    const Real* weights() const {
        return weights_;
    }
    // Below 0 where there is none.
    const std::int32_t* cells(int corner) const {
        return cells_[corner];
    }

    // Whether it has any corner; without, it adds nothing, whatever its weight is.
    bool is_there(std::int64_t t) const {
        std::int32_t marks = kNoCell;
        PYFEAT_UNROLL
        for (int e = 0; e < kCorners; ++e) {
            marks &= cells_[e][t];
        }
        return marks >= 0;
    }

    void locate(const Real* locations, const Real* weights) {
        for (std::int64_t t = 0; t < table_.num_points; ++t) {
            for (int j = 0; j < kDims; ++j) {
                coordinates_[j][t] = locations[t * kDims + j];
            }
            weights_[t] = weights[t];
        }
        if (table_.softmax) {
            take_softmax();
        }
        for (int j = 0; j < kDims; ++j) {
            if constexpr (kDiscrete) {
                place_discretely(j);
            } else if (table_.border) {
                place<true>(j);
            } else {
                place<false>(j);
            }
        }
        for (int e = 0; e < kCorners; ++e) {
            number_cells(e);
        }
    }

    // The share of a corner in a value at a point, or its derivatives along axes; 0 outside.
    template <typename... Axes>
    Real share(int corner, std::int64_t t, Axes... axes) const {
        Real product{1};
        PYFEAT_UNROLL
        for (int j = 0; j < kDims && !kDiscrete; ++j) {
            const bool derived = (false || ... || (axes == j));
            product *= (derived ? slopes_ : shares_)[corner >> j & 1][j][t];
        }
        return kDiscrete && cells_[corner][t] < 0 ? Real{0} : product;
    }

    // What a corner weighs; NaN weights of points out of range do not count.
    Real weight(int corner, std::int64_t t) const {
        const Real product = weights_[t] * share(corner, t);
        return cells_[corner][t] < 0 ? Real{0} : product;
    }

  private:
    template <typename T>
    T* take(Scratch& scratch) const {
        return scratch.take<T>(num_slots_);
    }

    void take_softmax() {
        const std::int64_t num_points = table_.num_points;
        Real largest = -static_cast<Real>(INFINITY);
        double sum = 0.0;
        for (std::int64_t t = 0; t < num_points; ++t) {
            largest = largest > weights_[t] ? largest : weights_[t];
        }
        if constexpr (sizeof(Real) == sizeof(float)) {
            for (std::int64_t t = 0; t < num_slots_; t += kLanes) {
                const Floats below = subtract(load(weights_ + t), broadcast(largest));
                store(weights_ + t, exponential(below));
            }
        } else {
            for (std::int64_t t = 0; t < num_points; ++t) {
                weights_[t] = std::exp(weights_[t] - largest);
            }
        }
        for (std::int64_t t = 0; t < num_points; ++t) {
            sum += static_cast<double>(weights_[t]);
        }
        for (std::int64_t t = 0; t < num_points; ++t) {
            weights_[t] = static_cast<Real>(static_cast<double>(weights_[t]) / sum);
        }
    }

    template <bool kBorder>
    void place(int j) {
        const Real *coordinates = coordinates_[j], *factors = table_.factors[j];
        const std::int32_t *extents = table_.extents[j], *strides = table_.strides[j];
        Real *low = shares_[0][j], *high = shares_[1][j];
        Real *low_slope = slopes_[0][j], *high_slope = slopes_[1][j];
        std::int32_t *low_offset = offsets_[0][j], *high_offset = offsets_[1][j];
        const Real shift = table_.shift;
        for_slots(num_slots_, [=](std::int64_t t) {
            const auto [whole, above, slope] = place_linear<kBorder>(
                coordinates[t], factors[t], shift, static_cast<Real>(extents[t]));
            const auto cell = static_cast<std::int32_t>(whole);
            const std::int32_t offset = cell * strides[t];
            const bool has_low = is_below(cell, extents[t]);
            low[t] = has_low ? Real{1} - above : Real{0};
            low_slope[t] = has_low ? -slope : Real{0};
            low_offset[t] = has_low ? offset : kNoCell;
            const bool has_high = is_below(cell + 1, extents[t]);
            high[t] = has_high ? above : Real{0};
            high_slope[t] = has_high ? slope : Real{0};
            high_offset[t] = has_high ? offset + strides[t] : kNoCell;
        });
    }

    void place_discretely(int j) {
        const Real* coordinates = coordinates_[j];
        const std::int32_t *extents = table_.extents[j], *strides = table_.strides[j];
        std::int32_t* offsets = offsets_[0][j];
        for_slots(num_slots_, [=](std::int64_t t) {
            const std::int32_t cell = place_discrete(coordinates[t], static_cast<Real>(extents[t]));
            offsets[t] = is_below(cell, extents[t]) ? cell * strides[t] : kNoCell;
        });
    }

    void number_cells(int corner) {
        const std::int32_t *starts = table_.starts, *offsets[kDims];
        for (int j = 0; j < kDims; ++j) {
            offsets[j] = offsets_[corner >> j & 1][j];
        }
        std::int32_t* cells = cells_[corner];
        for_slots(num_slots_, [=](std::int64_t t) {
            std::int32_t cell = starts[t], marks = 0;
            PYFEAT_UNROLL
            for (int j = 0; j < kDims; ++j) {
                cell += offsets[j][t];
                marks |= offsets[j][t];
            }
            cells[t] = marks < 0 ? kNoCell : cell;
        });
    }

    const pyfeat::PointTable<Real>& table_;
    std::int64_t num_slots_;
    Real* weights_;
    Real* coordinates_[kDims];
    Real *shares_[2][kDims], *slopes_[2][kDims];
    std::int32_t* offsets_[2][kDims];
    std::int32_t* cells_[kCorners];
};

}  // namespace
