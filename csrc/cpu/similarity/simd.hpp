// SPDX-License-Identifier: Apache-2.0
// One register of floats, and how many of them make a tile, for the instruction set that the
// including source is compiled for. Included by those sources only; everything has internal
// linkage, so that no function with wide instructions can stand in for a portable one.
#pragma once

#include <cstdint>

#if defined(PYFEAT_ISA_AVX512_BF16)
#define PYFEAT_ISA_AVX512
#define PYFEAT_ISA_NAMESPACE avx512_bf16
#elif defined(PYFEAT_ISA_AVX512)
#define PYFEAT_ISA_NAMESPACE avx512
#endif

#if defined(PYFEAT_ISA_AVX512) || defined(PYFEAT_ISA_AVX2)
#include <immintrin.h>
#endif

namespace {

#if defined(PYFEAT_ISA_AVX512)

using Floats = __m512;
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
inline Floats broadcast(float value) {
    return _mm512_set1_ps(value);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline Floats subtract(Floats a, Floats b) {
    return _mm512_sub_ps(a, b);
}
inline std::uint32_t less_or_equal(Floats a, Floats b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
}

#elif defined(PYFEAT_ISA_AVX2)
#define PYFEAT_ISA_NAMESPACE avx2

using Floats = __m256;
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
inline Floats broadcast(float value) {
    return _mm256_set1_ps(value);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline Floats subtract(Floats a, Floats b) {
    return _mm256_sub_ps(a, b);
}
inline std::uint32_t less_or_equal(Floats a, Floats b) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
}

#else
#define PYFEAT_ISA_NAMESPACE scalar

using Floats = float;
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
inline Floats broadcast(float value) {
    return value;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return a * b + c;
}
inline Floats subtract(Floats a, Floats b) {
    return a - b;
}
inline std::uint32_t less_or_equal(Floats a, Floats b) {
    return a <= b ? 1U : 0U;
}

#endif

constexpr int kTileRows = kTileVectors * kLanes;

}  // namespace
