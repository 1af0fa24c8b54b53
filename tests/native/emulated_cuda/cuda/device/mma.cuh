// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cuda/device/mma.cuh.
#pragma once

#include <cstring>

#include "cuda/device/shared.cuh"
#include "half_floats.hpp"

namespace pyfeat::cuda {

struct EmulatedLdmatrix {
    std::uint32_t* values;
    const void* row;

    // Register i of lane l is the pair l % 4 of row l / 4 of matrix i, whose rows lanes 8 i to 8 i
    // + 7 point to.
    static void perform(std::uint32_t, void* const* operands) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const auto* from = static_cast<EmulatedLdmatrix*>(operands[8 * i + lane / 4]);
                std::memcpy(static_cast<EmulatedLdmatrix*>(operands[lane])->values + i,
                            static_cast<const char*>(from->row) + 4 * (lane % 4),
                            sizeof(std::uint32_t));
            }
        }
    }
};

inline void ldmatrix_x4(std::uint32_t (&values)[4], const void* row, Here here = Here::now()) {
    if (shared_address(row, here) % 16 != 0) {
        emulated_cuda::fail(here, "ldmatrix of a row at an address that is no multiple of 16");
    }
    emulated_cuda::check_read(row, 16, here);
    EmulatedLdmatrix own{values, row};
    emulated_cuda::warp_together(0xFFFFFFFFU, "ldmatrix", EmulatedLdmatrix::perform, &own, here);
}

// kToFloat: of the bits of an operand.
template <float (*kToFloat)(std::uint16_t)>
struct EmulatedMma {
    float* products;
    const std::uint32_t *a, *b;

    // Fragments of the manual, for .m16n8k16 with 16-bit operands.
    static void perform(std::uint32_t, void* const* operands) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& own = *static_cast<EmulatedMma*>(operands[lane]);
            const int group = lane / 4, in_group = lane % 4;
            for (int i = 0; i < 8; ++i) {
                const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
                const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
                a[row][column] = half_of(own.a, i);
            }
            for (int i = 0; i < 4; ++i) {
                b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = half_of(own.b, i);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto& own = *static_cast<EmulatedMma*>(operands[lane]);
            for (int i = 0; i < 4; ++i) {
                const int row = i < 2 ? lane / 4 : lane / 4 + 8;
                const int column = lane % 4 * 2 + (i & 1);
                double sum = own.products[i];
                for (int k = 0; k < 16; ++k) {
                    sum += static_cast<double>(a[row][k]) * b[k][column];
                }
                own.products[i] = emulated_cuda::toward_zero(sum);
            }
        }
    }
    static float half_of(const std::uint32_t* registers, int i) {
        return kToFloat(static_cast<std::uint16_t>(registers[i / 2] >> (16 * (i % 2))));
    }
};

template <float (*kToFloat)(std::uint16_t)>
void emulated_mma(float (&products)[4],
                  const std::uint32_t (&a)[4],
                  const std::uint32_t (&b)[2],
                  Here here) {
    EmulatedMma<kToFloat> own{products, a, b};
    emulated_cuda::warp_together(0xFFFFFFFFU, "mma", own.perform, &own, here);
}

inline void mma_m16n8k16_bf16(float (&products)[4],
                              const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2],
                              Here here = Here::now()) {
    emulated_mma<emulated_cuda::from_bf16>(products, a, b, here);
}
inline void mma_m16n8k16_f16(float (&products)[4],
                             const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[2],
                             Here here = Here::now()) {
    emulated_mma<emulated_cuda::from_float16>(products, a, b, here);
}

}  // namespace pyfeat::cuda
