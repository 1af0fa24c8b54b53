// SPDX-License-Identifier: Apache-2.0
// Products of a warpgroup on tensor cores, of compute capability 9.0a: four warps from a multiple
// of four on, all threads alike. They run by themselves: from the first product to the wait,
// nothing else may touch the registers of products or the shared memory of operands.
#pragma once

#include <cstdint>

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

// An operand in shared memory: lines of 64 bfloat16 values, 128 bytes, whose 16-byte pieces are
// swizzled (piece ^ line % 8), groups of eight lines one after another, the first one at an address
// that is a multiple of 1024 bytes. 32 bytes further on begin the next 16 columns.
__device__ inline std::uint64_t wgmma_operand(const void* shared) {
    constexpr std::uint64_t kGroupBytes = 1024, kSwizzle128 = 1;
    return (shared_address(shared) & 0x3FFFFU) >> 4 | std::uint64_t{1} << 16 |
           kGroupBytes >> 4 << 32 | kSwizzle128 << 62;
}

// Registers and shared memory as they are may be used by the products that follow.
__device__ inline void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last commit form a group.
__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups are under way.
template <int kPending, int N>
__device__ inline void wgmma_wait(float (&products)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            asm volatile("" : "+f"(products[j][e])::"memory");  // not read before
        }
    }
}

// products (+)= A B^T, A [64, 16] and B [256, 16] bfloat16 by their descriptors; without
// `accumulate` what was there is dropped. Lane l of warp w has the pairs at row 16 w + l / 4,
// column 8 j + 2 (l % 4), and 8 rows below.
__device__ inline void wgmma_m64n256k16_bf16(float (&products)[32][4],
                                             std::uint64_t a,
                                             std::uint64_t b,
                                             bool accumulate) {
    asm volatile(
        "{\n\t"
        ".reg .pred accumulate;\n\t"
        "setp.ne.b32 accumulate, %130, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, "
        "%88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, "
        "%104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, "
        "%120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, accumulate, 1, 1, 0, 0;\n\t"
        "}"
        : "+f"(products[0][0]),
          "+f"(products[0][1]),
          "+f"(products[0][2]),
          "+f"(products[0][3]),
          "+f"(products[1][0]),
          "+f"(products[1][1]),
          "+f"(products[1][2]),
          "+f"(products[1][3]),
          "+f"(products[2][0]),
          "+f"(products[2][1]),
          "+f"(products[2][2]),
          "+f"(products[2][3]),
          "+f"(products[3][0]),
          "+f"(products[3][1]),
          "+f"(products[3][2]),
          "+f"(products[3][3]),
          "+f"(products[4][0]),
          "+f"(products[4][1]),
          "+f"(products[4][2]),
          "+f"(products[4][3]),
          "+f"(products[5][0]),
          "+f"(products[5][1]),
          "+f"(products[5][2]),
          "+f"(products[5][3]),
          "+f"(products[6][0]),
          "+f"(products[6][1]),
          "+f"(products[6][2]),
          "+f"(products[6][3]),
          "+f"(products[7][0]),
          "+f"(products[7][1]),
          "+f"(products[7][2]),
          "+f"(products[7][3]),
          "+f"(products[8][0]),
          "+f"(products[8][1]),
          "+f"(products[8][2]),
          "+f"(products[8][3]),
          "+f"(products[9][0]),
          "+f"(products[9][1]),
          "+f"(products[9][2]),
          "+f"(products[9][3]),
          "+f"(products[10][0]),
          "+f"(products[10][1]),
          "+f"(products[10][2]),
          "+f"(products[10][3]),
          "+f"(products[11][0]),
          "+f"(products[11][1]),
          "+f"(products[11][2]),
          "+f"(products[11][3]),
          "+f"(products[12][0]),
          "+f"(products[12][1]),
          "+f"(products[12][2]),
          "+f"(products[12][3]),
          "+f"(products[13][0]),
          "+f"(products[13][1]),
          "+f"(products[13][2]),
          "+f"(products[13][3]),
          "+f"(products[14][0]),
          "+f"(products[14][1]),
          "+f"(products[14][2]),
          "+f"(products[14][3]),
          "+f"(products[15][0]),
          "+f"(products[15][1]),
          "+f"(products[15][2]),
          "+f"(products[15][3]),
          "+f"(products[16][0]),
          "+f"(products[16][1]),
          "+f"(products[16][2]),
          "+f"(products[16][3]),
          "+f"(products[17][0]),
          "+f"(products[17][1]),
          "+f"(products[17][2]),
          "+f"(products[17][3]),
          "+f"(products[18][0]),
          "+f"(products[18][1]),
          "+f"(products[18][2]),
          "+f"(products[18][3]),
          "+f"(products[19][0]),
          "+f"(products[19][1]),
          "+f"(products[19][2]),
          "+f"(products[19][3]),
          "+f"(products[20][0]),
          "+f"(products[20][1]),
          "+f"(products[20][2]),
          "+f"(products[20][3]),
          "+f"(products[21][0]),
          "+f"(products[21][1]),
          "+f"(products[21][2]),
          "+f"(products[21][3]),
          "+f"(products[22][0]),
          "+f"(products[22][1]),
          "+f"(products[22][2]),
          "+f"(products[22][3]),
          "+f"(products[23][0]),
          "+f"(products[23][1]),
          "+f"(products[23][2]),
          "+f"(products[23][3]),
          "+f"(products[24][0]),
          "+f"(products[24][1]),
          "+f"(products[24][2]),
          "+f"(products[24][3]),
          "+f"(products[25][0]),
          "+f"(products[25][1]),
          "+f"(products[25][2]),
          "+f"(products[25][3]),
          "+f"(products[26][0]),
          "+f"(products[26][1]),
          "+f"(products[26][2]),
          "+f"(products[26][3]),
          "+f"(products[27][0]),
          "+f"(products[27][1]),
          "+f"(products[27][2]),
          "+f"(products[27][3]),
          "+f"(products[28][0]),
          "+f"(products[28][1]),
          "+f"(products[28][2]),
          "+f"(products[28][3]),
          "+f"(products[29][0]),
          "+f"(products[29][1]),
          "+f"(products[29][2]),
          "+f"(products[29][3]),
          "+f"(products[30][0]),
          "+f"(products[30][1]),
          "+f"(products[30][2]),
          "+f"(products[30][3]),
          "+f"(products[31][0]),
          "+f"(products[31][1]),
          "+f"(products[31][2]),
          "+f"(products[31][3])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// A warpgroup leaves all but kCount registers a thread to others, or waits for more. kCount is a
// multiple of 8; the kernel has __launch_bounds__ with one thread block.
template <int kCount>
__device__ inline void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace pyfeat::cuda
