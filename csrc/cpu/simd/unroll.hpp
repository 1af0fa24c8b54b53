// SPDX-License-Identifier: Apache-2.0
// What compilers are told in their own words.
#pragma once

// Sums stay in registers only if the loops over a tile are unrolled before they are optimised.
#if defined(__clang__)
#define PYFEAT_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define PYFEAT_UNROLL _Pragma("GCC unroll 16")
#else
#define PYFEAT_UNROLL
#endif

#if defined(__GNUC__)
#define PYFEAT_INLINE __attribute__((always_inline))
#define PYFEAT_NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define PYFEAT_INLINE
#define PYFEAT_NOINLINE __declspec(noinline)
#else
#define PYFEAT_INLINE
#define PYFEAT_NOINLINE
#endif

#if defined(__GNUC__)
#define PYFEAT_PREFETCH(address) __builtin_prefetch(address)
#define PYFEAT_PREFETCH_SECOND_LEVEL(address) __builtin_prefetch(address, 0, 2)
#else
#define PYFEAT_PREFETCH(address) static_cast<void>(address)
#define PYFEAT_PREFETCH_SECOND_LEVEL(address) static_cast<void>(address)
#endif

// Before a loop whose steps do not read what others write.
#if defined(__clang__)
#define PYFEAT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define PYFEAT_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define PYFEAT_INDEPENDENT __pragma(loop(ivdep))
#else
#define PYFEAT_INDEPENDENT
#endif
