// SPDX-License-Identifier: Apache-2.0
// Powers of two of a register of floats.
#pragma once

#include "cpu/simd/simd.hpp"

namespace {

// 2^x = mantissa * 2^exponent, the exponent whole and the mantissa about [0.7, 1.42].
struct Power {
    Floats mantissa, exponent;
};

// Of finite x. The exponent is x rounded, f = x - exponent is exact and in [-1/2, 1/2], and
//   2^f ~ 1 + f q(f),  q = c1 + c2 f + ... + c6 f^5,
// a minimax fit with coefficients in float32: relative error below 2^-28.3. With u = 2^-24 and
// |f| <= 1/2, q (in [0.58, 0.83]) is rounded by u/2 in its last step and by less than u/2 before
// it, so f q is off by less than u/2, and by u/4 more where the product is rounded for itself. With
// 0.07 u for the fit and half a unit for the last sum, units being u below 1 and 2u from 1 on, 2^f
// is off by less than 1.4 units in the last place. Whole x give exact powers.
inline Power power_of(Floats exponent, Floats f) {
    Floats q = broadcast(0x1.417a5cp-13F);
    q = multiply_add(q, f, broadcast(0x1.5f0946p-10F));
    q = multiply_add(q, f, broadcast(0x1.3b2dd2p-7F));
    q = multiply_add(q, f, broadcast(0x1.c6af7ap-5F));
    q = multiply_add(q, f, broadcast(0x1.ebfbdcp-3F));
    q = multiply_add(q, f, broadcast(0x1.62e430p-1F));
    return {multiply_add(q, f, broadcast(1.0F)), exponent};
}

inline Power split_power(Floats x) {
    const Floats exponent = round_to_whole(x);
    return power_of(exponent, subtract(x, exponent));
}

// Of x + more, `more` being below 2^-10: a little beyond 1/2 the fit is as good.
inline Power split_power(Floats x, Floats more) {
    const Floats exponent = round_to_whole(x);
    return power_of(exponent, add(subtract(x, exponent), more));
}

// 2^(x - shift) for a whole shift >= x - 127.
inline Floats shifted(const Power& power, Floats shift) {
    return times_power_of_two(power.mantissa, subtract(power.exponent, shift));
}

// e^x for x <= 0: the multiple of ln 2 next to x is taken off in two parts, of which the first has
// 15 bits, so that its product with a whole number below 2^9 is exact, with or without a fused
// multiply-add.
inline Floats exponential(Floats x) {
    const Floats at_least = maximum(broadcast(-150.0F), x);  // NaN stays NaN
    const Floats whole = round_to_whole(multiply(at_least, broadcast(0x1.715476p+0F)));
    const Floats rest =
        negative_multiply_add(whole,
                              broadcast(0x1.7f7d1cp-20F),
                              negative_multiply_add(whole, broadcast(0x1.62e4p-1F), at_least));
    return shifted(power_of(whole, multiply(rest, broadcast(0x1.715476p+0F))), zero());
}

}  // namespace
