// SPDX-License-Identifier: Apache-2.0
// The points of one query and head: their cells, and what these weigh. Arithmetic over all points
// at a time in plain loops, for compilers to turn into registers. Compiled once per instruction
// set.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/sampling/kernels.hpp"
#include "cpu/similarity/power.hpp"
#include "cpu/similarity/unroll.hpp"

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

// Added to the number of a cell along an axis where there is none: sums of three stay below 0.
constexpr std::int64_t kNoCell = INT64_MIN / 8;

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
                offsets_[side][j] = take<std::int64_t>(scratch);
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
            cells_[e] = take<std::int64_t>(scratch);
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
    const std::int64_t* cells(int corner) const {
        return cells_[corner];
    }

    // Whether it has any corner; without, it adds nothing, whatever its weight is.
    bool is_there(std::int64_t t) const {
        bool there = false;
        for (int e = 0; e < kCorners; ++e) {
            there = there || cells_[e][t] >= 0;
        }
        return there;
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
                place_discrete(j);
            } else if (table_.border) {
                place<true>(j);
            } else {
                place<false>(j);
            }
        }
        for (int e = 0; e < kCorners; ++e) {
            PYFEAT_INDEPENDENT
            for (std::int64_t t = 0; t < num_slots_; ++t) {
                std::int64_t offset = 0;
                PYFEAT_UNROLL
                for (int j = 0; j < kDims; ++j) {
                    offset += offsets_[e >> j & 1][j][t];
                }
                cells_[e][t] = offset < 0 ? -1 : table_.starts[t] + offset;
            }
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
        return cells_[corner][t] < 0 ? Real{0} : weights_[t] * share(corner, t);
    }

  private:
    template <typename T>
    T* take(Scratch& scratch) const {
        return scratch.take<T>(num_slots_);
    }

    void take_softmax() {
        const std::int64_t num_points = table_.num_points;
        Real largest = -static_cast<Real>(INFINITY), sum{0};
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
            sum += weights_[t];
        }
        for (std::int64_t t = 0; t < num_points; ++t) {
            weights_[t] /= sum;
        }
    }

    // Comparisons come before conversions to whole numbers, which are not defined for all floats.
    template <bool kBorder>
    void place(int j) {
        const Real *factors = table_.factors[j], *extents = table_.extents[j];
        const std::int64_t* strides = table_.strides[j];
        const Real* coordinates = coordinates_[j];
        Real *low = shares_[0][j], *high = shares_[1][j];
        Real *low_slope = slopes_[0][j], *high_slope = slopes_[1][j];
        std::int64_t *low_offset = offsets_[0][j], *high_offset = offsets_[1][j];
        const Real shift = table_.shift;
        PYFEAT_INDEPENDENT
        for (std::int64_t t = 0; t < num_slots_; ++t) {
            const Real p = coordinates[t], last = extents[t] - Real{1};
            Real u = p * factors[t] - shift;
            bool there, moves = true;
            if constexpr (kBorder) {
                there = p == p && last >= Real{0};
                moves = u > Real{0} && u < last;
                u = u > Real{0} ? u : Real{0};
                u = u < last ? u : last;
            } else {
                there = u >= Real{-1} && u < extents[t];
            }
            u = there ? u : Real{0};
            const Real whole = std::floor(u);
            const Real above = u - whole, slope = moves ? Real{1} : Real{0};
            const bool has_low = there && whole >= Real{0}, has_high = there && whole < last;
            low[t] = has_low ? Real{1} - above : Real{0};
            high[t] = has_high ? above : Real{0};
            low_slope[t] = has_low ? -slope : Real{0};
            high_slope[t] = has_high ? slope : Real{0};
            const auto cell = static_cast<std::int64_t>(whole);
            low_offset[t] = has_low ? cell * strides[t] : kNoCell;
            high_offset[t] = has_high ? (cell + 1) * strides[t] : kNoCell;
        }
    }

    void place_discrete(int j) {
        PYFEAT_INDEPENDENT
        for (std::int64_t t = 0; t < num_slots_; ++t) {
            const Real p = coordinates_[j][t], extent = table_.extents[j][t];
            Real u = p * extent + Real{0.5};
            u = u > Real{0} ? u : Real{0};
            u = u < extent - Real{1} ? u : extent - Real{1};
            const bool there = p == p && extent > Real{0};
            const auto cell = static_cast<std::int64_t>(there ? u : Real{0});
            offsets_[0][j][t] = there ? cell * table_.strides[j][t] : kNoCell;
        }
    }

    const pyfeat::PointTable<Real>& table_;
    std::int64_t num_slots_;
    Real* weights_;
    Real* coordinates_[kDims];
    Real *shares_[2][kDims], *slopes_[2][kDims];
    std::int64_t* offsets_[2][kDims];
    std::int64_t* cells_[kCorners];
};

}  // namespace
