// SPDX-License-Identifier: Apache-2.0
// Products of a warp on tensor cores, and the loads that lay out their operands.
#pragma once

#include <cstdint>

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

// Four 8 x 8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8, and
// gets the values 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
__device__ inline void ldmatrix_x4(std::uint32_t (&values)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// products += A B, A 16 x 16 by rows, B 16 x 8 by columns, bfloat16. Lane l has of A the pairs at
// (l / 4, 2 (l % 4)), 8 rows below, 8 columns on, and both; of B those at (2 (l % 4), l / 4) and 8
// rows below; of products the pairs at (l / 4, 2 (l % 4)) and 8 rows below.
__device__ inline void mma_m16n8k16_bf16(float (&products)[4],
                                         const std::uint32_t (&a)[4],
                                         const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(products[0]), "+f"(products[1]), "+f"(products[2]), "+f"(products[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of float16.
__device__ inline void mma_m16n8k16_f16(float (&products)[4],
                                        const std::uint32_t (&a)[4],
                                        const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(products[0]), "+f"(products[1]), "+f"(products[2]), "+f"(products[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace pyfeat::cuda
