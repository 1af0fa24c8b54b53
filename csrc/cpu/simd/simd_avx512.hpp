// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/unroll.hpp"

namespace {

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;
// 24 accumulators, 2 registers of rows and 1 query value fill 27 of the 32 registers.
constexpr int kTileQueries = 12;
constexpr int kTileVectors = 2;

inline Floats zero() {
    return _mm512_setzero_ps();
}
inline Floats load(const float* p) {
    return _mm512_load_ps(p);
}
inline void store(float* p, Floats v) {
    _mm512_store_ps(p, v);
}
inline void store_past_caches(float* p, Floats v) {
    _mm512_stream_ps(p, v);
}
inline Floats load_unaligned(const float* p) {
    return _mm512_loadu_ps(p);
}
inline void store_unaligned(float* p, Floats v) {
    _mm512_storeu_ps(p, v);
}
inline Floats broadcast(float value) {
    return _mm512_set1_ps(value);
}
inline Floats multiply(Floats a, Floats b) {
    return _mm512_mul_ps(a, b);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return _mm512_fmadd_ps(a, b, c);
}
// c - a b
inline Floats negative_multiply_add(Floats a, Floats b, Floats c) {
    return _mm512_fnmadd_ps(a, b, c);
}
inline Floats add(Floats a, Floats b) {
    return _mm512_add_ps(a, b);
}
inline Floats subtract(Floats a, Floats b) {
    return _mm512_sub_ps(a, b);
}
inline Floats divide(Floats a, Floats b) {
    return _mm512_div_ps(a, b);
}
inline Floats maximum(Floats a, Floats b) {
    return _mm512_max_ps(a, b);
}
// Lane i of the result is the sum of the lanes of the i-th of as many registers.
PYFEAT_INLINE inline Floats sums_of_registers(const Floats* registers) {
    Floats fours[4];
    PYFEAT_UNROLL
    for (int i = 0; i < 4; ++i) {
        const Floats* r = registers + 4 * i;
        const Floats low = add(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
        const Floats high = add(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
        // In each quarter of the register, one lane for each of the four.
        fours[i] = add(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
    }
    const Floats first = add(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                             _mm512_shuffle_f32x4(fours[0], fours[1], 0xDD));
    const Floats second = add(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                              _mm512_shuffle_f32x4(fours[2], fours[3], 0xDD));
    return add(_mm512_shuffle_f32x4(first, second, 0x88),
               _mm512_shuffle_f32x4(first, second, 0xDD));
}
inline Floats if_negative(Floats v, Floats a, Floats b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(v)), b, a);
}
inline Floats round_to_whole(Floats v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats times_power_of_two(Floats v, Floats exponent) {
    return _mm512_scalef_ps(v, exponent);
}
inline std::uint32_t less_or_equal(Floats a, Floats b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
}
inline std::uint32_t equal(Ints a, Ints b) {
    return _mm512_cmpeq_epi32_mask(a, b);
}
inline Ints load_ints(const float* p) {
    return _mm512_load_si512(p);
}
inline void store_ints(float* p, Ints v) {
    _mm512_store_si512(p, v);
}
inline Ints broadcast_word(const float* p) {
    return _mm512_castps_si512(_mm512_set1_ps(*p));
}
inline Floats to_floats(Ints v) {
    return _mm512_cvtepi32_ps(v);
}
inline Floats low_halves(Ints pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
inline Floats high_halves(Ints pairs) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000U))));
}

#if defined(PYFEAT_ISA_AVX512_VNNI)
constexpr int kQueryLevels = 127;
constexpr int kQueryOffset = 128;

inline Ints multiply_bytes(Ints query, Ints rows, Ints sum) {
    return _mm512_dpbusd_epi32(sum, query, rows);
}
#else
// Pairs of products are added in 16 bits: 2 * 126 * 127 = 32,004 < 2^15.
constexpr int kQueryLevels = 63;
constexpr int kQueryOffset = 63;

inline Ints multiply_bytes(Ints query, Ints rows, Ints sum) {
    const Ints pairs = _mm512_maddubs_epi16(query, rows);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

}  // namespace
