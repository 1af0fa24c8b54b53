// SPDX-License-Identifier: Apache-2.0
// Arithmetic and conversions that name their rounding: rn nearest even, rz to zero, ru up, rd down.
// Built without contraction: nothing else is fused either.
#pragma once

#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

namespace emulated_cuda {

// The result of operation() under a mode of rounding, without constant folding.
template <typename Operation>
auto rounded(int mode, Operation operation) {
    const int before = std::fegetround();
    std::fesetround(mode);
    const volatile auto result = operation();
    std::fesetround(before);
    return static_cast<std::remove_cv_t<decltype(result)>>(result);
}

// What conversions to integers do outside of the range: the nearest integer there is, 0 for NaN.
template <typename To, typename From>
To saturated(From x) {
    if (std::isnan(x)) {
        return 0;
    }
    if (x <= static_cast<From>(std::numeric_limits<To>::min())) {
        return std::numeric_limits<To>::min();
    }
    if (x >= static_cast<From>(std::numeric_limits<To>::max())) {
        return std::numeric_limits<To>::max();
    }
    return static_cast<To>(x);
}

}  // namespace emulated_cuda

#define PYFEAT_BINARY(name, type, suffix, mode, operator_)                  \
    inline type name##_##suffix(type x, type y) {                           \
        const volatile type a = x, b = y;                                   \
        return emulated_cuda::rounded(mode, [&] { return a operator_ b; }); \
    }
#define PYFEAT_FMA(name, type, suffix, mode)                                    \
    inline type name##_##suffix(type x, type y, type z) {                       \
        const volatile type a = x, b = y, c = z;                                \
        return emulated_cuda::rounded(mode, [&] { return std::fma(a, b, c); }); \
    }
#define PYFEAT_ROUNDED(suffix, mode)                                                 \
    PYFEAT_BINARY(__fadd, float, suffix, mode, +)                                    \
    PYFEAT_BINARY(__fsub, float, suffix, mode, -)                                    \
    PYFEAT_BINARY(__fmul, float, suffix, mode, *)                                    \
    PYFEAT_BINARY(__fdiv, float, suffix, mode, /)                                    \
    PYFEAT_BINARY(__dadd, double, suffix, mode, +)                                   \
    PYFEAT_BINARY(__dsub, double, suffix, mode, -)                                   \
    PYFEAT_BINARY(__dmul, double, suffix, mode, *)                                   \
    PYFEAT_BINARY(__ddiv, double, suffix, mode, /)                                   \
    PYFEAT_FMA(__fmaf, float, suffix, mode)                                          \
    PYFEAT_FMA(__fma, double, suffix, mode)                                          \
    inline float __fsqrt_##suffix(float x) {                                         \
        const volatile float a = x;                                                  \
        return emulated_cuda::rounded(mode, [&] { return std::sqrt(a); });           \
    }                                                                                \
    inline double __dsqrt_##suffix(double x) {                                       \
        const volatile double a = x;                                                 \
        return emulated_cuda::rounded(mode, [&] { return std::sqrt(a); });           \
    }                                                                                \
    inline float __double2float_##suffix(double x) {                                 \
        const volatile double a = x;                                                 \
        return emulated_cuda::rounded(mode, [&] { return static_cast<float>(a); });  \
    }                                                                                \
    inline float __int2float_##suffix(int x) {                                       \
        const volatile int a = x;                                                    \
        return emulated_cuda::rounded(mode, [&] { return static_cast<float>(a); });  \
    }                                                                                \
    inline float __ll2float_##suffix(long long x) {                                  \
        const volatile long long a = x;                                              \
        return emulated_cuda::rounded(mode, [&] { return static_cast<float>(a); });  \
    }                                                                                \
    inline double __ll2double_##suffix(long long x) {                                \
        const volatile long long a = x;                                              \
        return emulated_cuda::rounded(mode, [&] { return static_cast<double>(a); }); \
    }
PYFEAT_ROUNDED(rn, FE_TONEAREST)
PYFEAT_ROUNDED(rz, FE_TOWARDZERO)
PYFEAT_ROUNDED(ru, FE_UPWARD)
PYFEAT_ROUNDED(rd, FE_DOWNWARD)
#undef PYFEAT_ROUNDED
#undef PYFEAT_FMA
#undef PYFEAT_BINARY

inline double __int2double_rn(int x) {
    return x;
}

#define PYFEAT_TO_INTEGER(suffix, function)                      \
    inline int __float2int_##suffix(float x) {                   \
        return emulated_cuda::saturated<int>(function(x));       \
    }                                                            \
    inline unsigned __float2uint_##suffix(float x) {             \
        return emulated_cuda::saturated<unsigned>(function(x));  \
    }                                                            \
    inline long long __float2ll_##suffix(float x) {              \
        return emulated_cuda::saturated<long long>(function(x)); \
    }                                                            \
    inline int __double2int_##suffix(double x) {                 \
        return emulated_cuda::saturated<int>(function(x));       \
    }                                                            \
    inline long long __double2ll_##suffix(double x) {            \
        return emulated_cuda::saturated<long long>(function(x)); \
    }
PYFEAT_TO_INTEGER(rn, std::nearbyint)
PYFEAT_TO_INTEGER(rz, std::trunc)
PYFEAT_TO_INTEGER(ru, std::ceil)
PYFEAT_TO_INTEGER(rd, std::floor)
#undef PYFEAT_TO_INTEGER

inline float __fdividef(float x, float y) {
    return x / y;
}
inline float __saturatef(float x) {
    return x > 0.0F ? (x < 1.0F ? x : 1.0F) : 0.0F;
}
inline float rsqrtf(float x) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline double rsqrt(double x) {
    return 1.0 / std::sqrt(x);
}
inline float __expf(float x) {
    return std::exp(x);
}
inline float __exp2f(float x) {
    return std::exp2(x);
}
inline float __logf(float x) {
    return std::log(x);
}
inline float __log2f(float x) {
    return std::log2(x);
}

// Of device code without a namespace.
#define PYFEAT_MIN_MAX(type)          \
    inline type min(type x, type y) { \
        return y < x ? y : x;         \
    }                                 \
    inline type max(type x, type y) { \
        return x < y ? y : x;         \
    }
PYFEAT_MIN_MAX(int)
PYFEAT_MIN_MAX(unsigned)
PYFEAT_MIN_MAX(long)
PYFEAT_MIN_MAX(unsigned long)
PYFEAT_MIN_MAX(long long)
PYFEAT_MIN_MAX(unsigned long long)
#undef PYFEAT_MIN_MAX
inline float min(float x, float y) {
    return std::fmin(x, y);
}
inline float max(float x, float y) {
    return std::fmax(x, y);
}
inline double min(double x, double y) {
    return std::fmin(x, y);
}
inline double max(double x, double y) {
    return std::fmax(x, y);
}
