// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

using Floats = float32x4_t;
using Ints = int32x4_t;
constexpr int kLanes = 4;
// 24 accumulators, 3 registers of rows and 1 query value fill 28 of the 32 registers.
constexpr int kTileQueries = 8;
constexpr int kTileVectors = 3;

inline Floats zero() {
    return vdupq_n_f32(0.0F);
}
inline Floats load(const float* p) {
    return vld1q_f32(p);
}
inline void store(float* p, Floats v) {
    vst1q_f32(p, v);
}
inline void store_past_caches(float* p, Floats v) {
    store(p, v);
}
inline Floats load_unaligned(const float* p) {
    return vld1q_f32(p);
}
inline void store_unaligned(float* p, Floats v) {
    vst1q_f32(p, v);
}
inline Floats broadcast(float value) {
    return vdupq_n_f32(value);
}
inline Floats multiply(Floats a, Floats b) {
    return vmulq_f32(a, b);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return vfmaq_f32(c, a, b);
}
// c - a b
inline Floats negative_multiply_add(Floats a, Floats b, Floats c) {
    return vfmsq_f32(c, a, b);
}
inline Floats add(Floats a, Floats b) {
    return vaddq_f32(a, b);
}
inline Floats subtract(Floats a, Floats b) {
    return vsubq_f32(a, b);
}
inline Floats divide(Floats a, Floats b) {
    return vdivq_f32(a, b);
}
inline Floats maximum(Floats a, Floats b) {
    return vmaxq_f32(a, b);
}
// Lane i of the result is the sum of the lanes of the i-th of as many registers.
inline Floats sums_of_registers(const Floats* registers) {
    return vpaddq_f32(vpaddq_f32(registers[0], registers[1]),
                      vpaddq_f32(registers[2], registers[3]));
}
inline Floats if_negative(Floats v, Floats a, Floats b) {
    return vbslq_f32(vcltq_f32(v, vdupq_n_f32(0.0F)), a, b);
}
inline Floats round_to_whole(Floats v) {
    return vrndnq_f32(v);
}
inline Floats times_power_of_two(Floats v, Floats exponent) {
    const Floats biased =
        vaddq_f32(vmaxq_f32(exponent, vdupq_n_f32(-127.0F)), vdupq_n_f32(kExponentInLowBits));
    return vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(biased), 23)));
}
inline std::uint32_t less_or_equal(Floats a, Floats b) {
    const uint32x4_t bits = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcleq_f32(a, b), bits));
}
inline std::uint32_t equal(Ints a, Ints b) {
    const uint32x4_t bits = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vceqq_s32(a, b), bits));
}
inline Ints load_ints(const float* p) {
    return vreinterpretq_s32_f32(vld1q_f32(p));
}
inline void store_ints(float* p, Ints v) {
    vst1q_f32(p, vreinterpretq_f32_s32(v));
}
inline Ints broadcast_word(const float* p) {
    return vreinterpretq_s32_f32(vld1q_dup_f32(p));
}
inline Floats to_floats(Ints v) {
    return vcvtq_f32_s32(v);
}
inline Floats low_halves(Ints pairs) {
    return vreinterpretq_f32_s32(vshlq_n_s32(pairs, 16));
}
inline Floats high_halves(Ints pairs) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_s32(pairs), vdupq_n_u32(0xFFFF0000U)));
}

constexpr int kQueryLevels = 127;
constexpr int kQueryOffset = 0;

inline Ints multiply_bytes(Ints query, Ints rows, Ints sum) {
    const int8x16_t a = vreinterpretq_s8_s32(query), b = vreinterpretq_s8_s32(rows);
#if defined(PYFEAT_ISA_NEON_DOT)
    return vdotq_s32(sum, a, b);
#else
    // A product fits 16 bits: 127 * 127 = 16,129.
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    const int16x8_t high = vmull_high_s8(a, b);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

}  // namespace
