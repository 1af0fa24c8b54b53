// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/unroll.hpp"

namespace {

using Floats = __m256;
using Ints = __m256i;
constexpr int kLanes = 8;
// 12 accumulators, 2 registers of rows and 1 query value fill 15 of the 16 registers.
constexpr int kTileQueries = 6;
constexpr int kTileVectors = 2;

inline Floats zero() {
    return _mm256_setzero_ps();
}
inline Floats load(const float* p) {
    return _mm256_load_ps(p);
}
inline void store(float* p, Floats v) {
    _mm256_store_ps(p, v);
}
inline void store_past_caches(float* p, Floats v) {
    _mm256_stream_ps(p, v);
}
inline Floats load_unaligned(const float* p) {
    return _mm256_loadu_ps(p);
}
inline void store_unaligned(float* p, Floats v) {
    _mm256_storeu_ps(p, v);
}
inline Floats broadcast(float value) {
    return _mm256_set1_ps(value);
}
inline Floats multiply(Floats a, Floats b) {
    return _mm256_mul_ps(a, b);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return _mm256_fmadd_ps(a, b, c);
}
// c - a b
inline Floats negative_multiply_add(Floats a, Floats b, Floats c) {
    return _mm256_fnmadd_ps(a, b, c);
}
inline Floats add(Floats a, Floats b) {
    return _mm256_add_ps(a, b);
}
inline Floats subtract(Floats a, Floats b) {
    return _mm256_sub_ps(a, b);
}
inline Floats divide(Floats a, Floats b) {
    return _mm256_div_ps(a, b);
}
inline Floats maximum(Floats a, Floats b) {
    return _mm256_max_ps(a, b);
}
// Lane i of the result is the sum of the lanes of the i-th of as many registers.
PYFEAT_INLINE inline Floats sums_of_registers(const Floats* registers) {
    Floats fours[2];
    PYFEAT_UNROLL
    for (int i = 0; i < 2; ++i) {
        const Floats* r = registers + 4 * i;
        fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
    }
    return add(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
               _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
}
inline Floats if_negative(Floats v, Floats a, Floats b) {
    return _mm256_blendv_ps(b, a, v);
}
inline Floats round_to_whole(Floats v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats times_power_of_two(Floats v, Floats exponent) {
    const Floats biased = _mm256_add_ps(_mm256_max_ps(exponent, _mm256_set1_ps(-127.0F)),
                                        _mm256_set1_ps(kExponentInLowBits));
    const Ints bits = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
    return _mm256_mul_ps(v, _mm256_castsi256_ps(bits));
}
inline std::uint32_t less_or_equal(Floats a, Floats b) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
}
inline std::uint32_t equal(Ints a, Ints b) {
    const __m256 bits = _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b));
    return static_cast<std::uint32_t>(_mm256_movemask_ps(bits));
}
inline Ints load_ints(const float* p) {
    return _mm256_castps_si256(_mm256_load_ps(p));
}
inline void store_ints(float* p, Ints v) {
    _mm256_store_ps(p, _mm256_castsi256_ps(v));
}
inline Ints broadcast_word(const float* p) {
    return _mm256_castps_si256(_mm256_broadcast_ss(p));
}
inline Floats to_floats(Ints v) {
    return _mm256_cvtepi32_ps(v);
}
inline Floats low_halves(Ints pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
inline Floats high_halves(Ints pairs) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000U))));
}

#if defined(PYFEAT_ISA_AVX2_VNNI)
constexpr int kQueryLevels = 127;
constexpr int kQueryOffset = 128;

inline Ints multiply_bytes(Ints query, Ints rows, Ints sum) {
#if defined(__AVXVNNI__) || defined(_MSC_VER)
    return _mm256_dpbusd_avx_epi32(sum, query, rows);
#else
    // The same operation in its AVX-512 encoding, for tests on processors that lack the other.
    return _mm256_dpbusd_epi32(sum, query, rows);
#endif
}
#else
// Pairs of products are added in 16 bits: 2 * 126 * 127 = 32,004 < 2^15.
constexpr int kQueryLevels = 63;
constexpr int kQueryOffset = 63;

inline Ints multiply_bytes(Ints query, Ints rows, Ints sum) {
    const Ints pairs = _mm256_maddubs_epi16(query, rows);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

}  // namespace
