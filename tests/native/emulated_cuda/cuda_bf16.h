// SPDX-License-Identifier: Apache-2.0
// What kernels take from the toolkit's header of this name.
#pragma once

#include "half_floats.hpp"

struct __nv_bfloat16 {
    unsigned short bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    return {emulated_cuda::to_bfloat16(x)};
}
inline float __bfloat162float(__nv_bfloat16 x) {
    return emulated_cuda::from_bf16(x.bits);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) {
    return x.bits;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return {bits};
}
