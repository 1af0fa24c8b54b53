// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

namespace {

using Floats = float;
using Ints = std::int32_t;
constexpr int kLanes = 1;
constexpr int kTileQueries = 4;
constexpr int kTileVectors = 4;

inline Floats zero() {
    return 0.0F;
}
inline Floats load(const float* p) {
    return *p;
}
inline void store(float* p, Floats v) {
    *p = v;
}
inline void store_past_caches(float* p, Floats v) {
    store(p, v);
}
inline Floats load_unaligned(const float* p) {
    return *p;
}
inline void store_unaligned(float* p, Floats v) {
    *p = v;
}
inline Floats broadcast(float value) {
    return value;
}
inline Floats multiply(Floats a, Floats b) {
    return a * b;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return a * b + c;
}
// c - a b
inline Floats negative_multiply_add(Floats a, Floats b, Floats c) {
    return c - a * b;
}
inline Floats add(Floats a, Floats b) {
    return a + b;
}
inline Floats subtract(Floats a, Floats b) {
    return a - b;
}
inline Floats divide(Floats a, Floats b) {
    return a / b;
}
inline Floats maximum(Floats a, Floats b) {
    return a > b ? a : b;
}
inline Floats sums_of_registers(const Floats* registers) {
    return *registers;
}
inline Floats if_negative(Floats v, Floats a, Floats b) {
    return v < 0.0F ? a : b;
}
inline Floats round_to_whole(Floats v) {
    // From 2^23 on floats are whole; below, adding and taking away 2^23 rounds.
    const Floats round = v < 0.0F ? -0x1p23F : 0x1p23F;
    return v > -0x1p23F && v < 0x1p23F ? v + round - round : v;
}
inline Floats times_power_of_two(Floats v, Floats exponent) {
    const Floats biased = maximum(exponent, -127.0F) + kExponentInLowBits;
    std::uint32_t bits;
    std::memcpy(&bits, &biased, sizeof(bits));
    bits <<= 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof(power));
    return v * power;
}
inline std::uint32_t less_or_equal(Floats a, Floats b) {
    return a <= b ? 1U : 0U;
}
inline std::uint32_t equal(Ints a, Ints b) {
    return a == b ? 1U : 0U;
}
inline Ints load_ints(const float* p) {
    Ints word;
    std::memcpy(&word, p, sizeof(word));
    return word;
}
inline void store_ints(float* p, Ints v) {
    std::memcpy(p, &v, sizeof(v));
}
inline Ints broadcast_word(const float* p) {
    return load_ints(p);
}
inline Floats to_floats(Ints v) {
    return static_cast<float>(v);
}
inline Floats low_halves(Ints pairs) {
    const std::uint32_t bits = static_cast<std::uint32_t>(pairs) << 16;
    Floats value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline Floats high_halves(Ints pairs) {
    const std::uint32_t bits = static_cast<std::uint32_t>(pairs) & 0xFFFF0000U;
    Floats value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

constexpr int kQueryLevels = 127;
constexpr int kQueryOffset = 0;

inline Ints multiply_bytes(Ints query, Ints rows, Ints sum) {
    std::int8_t a[4], b[4];
    std::memcpy(a, &query, sizeof(a));
    std::memcpy(b, &rows, sizeof(b));
    for (int i = 0; i < 4; ++i) {
        sum += a[i] * b[i];
    }
    return sum;
}

}  // namespace
