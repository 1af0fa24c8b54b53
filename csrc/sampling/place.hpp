// SPDX-License-Identifier: Apache-2.0
// Where a location lies along one axis of a level: the rules of every compiled kernel. In selects
// that compilers turn into registers, and without linkage: it is compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.hpp"

namespace {

// A position where neither a cell nor the next is there.
template <typename Real>
constexpr Real kBefore{-2};

template <typename Real>
struct Place {
    Real whole;  // the lower of the two cells that the position is between, from -2 to extent
    Real above;  // how far the position is above it, in [0, 1)
    Real slope;  // 0 where the position is clipped, else 1
};

// Of u = p factor - shift. Clipped before it is converted: that is not defined for all floats. What
// compares with nothing lies beyond the border.
template <bool kBorder, typename Real>
PYFEAT_HOST_DEVICE inline Place<Real> place_linear(Real p, Real factor, Real shift, Real extent) {
    Real u = p * factor - shift, slope{1};
    if constexpr (kBorder) {
        const Real last = extent - Real{1};
        slope = (u > Real{0} ? Real{1} : Real{0}) * (u < last ? Real{1} : Real{0});
        u = u > Real{0} ? u : Real{0};
        u = u < last ? u : last;
        u = p == p ? u : kBefore<Real>;
    } else {
        u = u > kBefore<Real> ? u : kBefore<Real>;
        u = u < extent ? u : extent;
    }
    const Real whole = std::floor(u);
    return {whole, u - whole, slope};
}

// The nearest cell, below 0 for what is not a number.
template <typename Real>
PYFEAT_HOST_DEVICE inline std::int32_t place_discrete(Real p, Real extent) {
    const Real last = extent - Real{1};
    Real u = p * extent + Real{0.5};
    u = u > Real{0} ? u : Real{0};
    u = u < last ? u : last;
    u = p == p ? u : kBefore<Real>;
    return static_cast<std::int32_t>(u);
}

// Of a cell from -2 to extent + 1 one comparison without signs is enough.
PYFEAT_HOST_DEVICE inline bool is_below(std::int32_t cell, std::int32_t extent) {
    return static_cast<std::uint32_t>(cell) < static_cast<std::uint32_t>(extent);
}

}  // namespace
