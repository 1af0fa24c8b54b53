// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/wgmma.cuh.
#pragma once

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

inline std::uint64_t wgmma_operand(const void* shared, Here here = Here::now()) {
    constexpr std::uint64_t kGroupBytes = 1024, kSwizzle128 = 1;
    return (shared_address(shared, here) & 0x3FFFFU) >> 4 | std::uint64_t{1} << 16 |
           kGroupBytes >> 4 << 32 | kSwizzle128 << 62;
}

inline void wgmma_fence(Here here = Here::now()) {
    emulated_cuda::warpgroup_fence(here);
}
inline void wgmma_commit(Here here = Here::now()) {
    emulated_cuda::warpgroup_commit(here);
}
template <int kPending, int N>
void wgmma_wait(float (&)[N][4], Here here = Here::now()) {
    emulated_cuda::warpgroup_wait(kPending, here);
}

inline void wgmma_m64n256k16_bf16(float (&products)[32][4],
                                  std::uint64_t a,
                                  std::uint64_t b,
                                  bool accumulate,
                                  Here here = Here::now()) {
    emulated_cuda::warpgroup_multiply(products[0], 256, a, b, accumulate, here);
}

// Registers are not counted here.
template <int kCount>
void release_registers() {}
template <int kCount>
void claim_registers() {}

}  // namespace pyfeat::cuda
