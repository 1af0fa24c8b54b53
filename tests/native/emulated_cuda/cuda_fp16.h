// SPDX-License-Identifier: Apache-2.0
// What kernels take from the toolkit's header of this name.
#pragma once

#include "half_floats.hpp"

struct __half {
    unsigned short bits;
};

inline __half __float2half_rn(float x) {
    return {emulated_cuda::to_float16(x)};
}
inline float __half2float(__half x) {
    return emulated_cuda::from_float16(x.bits);
}
inline unsigned short __half_as_ushort(__half x) {
    return x.bits;
}
inline __half __ushort_as_half(unsigned short bits) {
    return {bits};
}
