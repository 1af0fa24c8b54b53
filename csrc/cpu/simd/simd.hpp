// SPDX-License-Identifier: Apache-2.0
// One register of floats or of whole numbers, and how many of them make a tile, for the instruction
// set that the including source is compiled for. Included by those sources only; everything has
// internal linkage, so that no function with wide instructions can stand in for a portable one.
//
// multiply_bytes(query, rows, sum) adds to each 32-bit sum the products of its four bytes. Bytes of
// rows are signed, those of queries are whole numbers in [-kQueryLevels, kQueryLevels] plus
// kQueryOffset. low_halves and high_halves widen the two bfloat16 of each 32-bit word.
//
// if_negative(v, a, b) is a where v < 0, b where v > 0, and either where v is 0.
// round_to_whole(v) goes to the nearest whole number, ties to even. times_power_of_two(v, exponent)
// is v * 2^exponent, exactly, for whole exponents up to 127 and v in [0.5, 2); what comes out below
// 2^-126 may lose digits or be 0.
#pragma once

#if defined(PYFEAT_ISA_AMX)
#define PYFEAT_ISA_NAMESPACE amx
#define PYFEAT_ISA_AVX512_BF16
#define PYFEAT_ISA_AVX512_VNNI
#elif defined(PYFEAT_ISA_AVX512_BF16)
#define PYFEAT_ISA_NAMESPACE avx512_bf16
#define PYFEAT_ISA_AVX512_VNNI
#elif defined(PYFEAT_ISA_AVX512_VNNI)
#define PYFEAT_ISA_NAMESPACE avx512_vnni
#elif defined(PYFEAT_ISA_AVX512)
#define PYFEAT_ISA_NAMESPACE avx512
#elif defined(PYFEAT_ISA_AVX2_VNNI)
#define PYFEAT_ISA_NAMESPACE avx2_vnni
#elif defined(PYFEAT_ISA_AVX2)
#define PYFEAT_ISA_NAMESPACE avx2
#elif defined(PYFEAT_ISA_NEON_DOT)
#define PYFEAT_ISA_NAMESPACE neon_dot
#elif defined(PYFEAT_ISA_NEON)
#define PYFEAT_ISA_NAMESPACE neon
#else
#define PYFEAT_ISA_NAMESPACE scalar
#endif

namespace {

// Added to a whole number in [-127, 128], leaves 127 more than that in the lowest bits of the sum:
// shifted left by 23, they are the float 2^number (0 for -127).
constexpr float kExponentInLowBits = 0x1.8p23F + 127.0F;

}  // namespace

#if defined(PYFEAT_ISA_AVX512) || defined(PYFEAT_ISA_AVX512_VNNI)
#include "cpu/simd/simd_avx512.hpp"
#elif defined(PYFEAT_ISA_AVX2) || defined(PYFEAT_ISA_AVX2_VNNI)
#include "cpu/simd/simd_avx2.hpp"
#elif defined(PYFEAT_ISA_NEON) || defined(PYFEAT_ISA_NEON_DOT)
#include "cpu/simd/simd_neon.hpp"
#else
#include "cpu/simd/simd_scalar.hpp"
#endif

namespace {

constexpr int kTileRows = kTileVectors * kLanes;

}  // namespace
