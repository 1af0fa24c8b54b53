// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set.
#include "cpu/similarity/kernels.hpp"

#include "cpu/similarity/distances.hpp"
#include "cpu/similarity/exponential.hpp"
#include "cpu/similarity/tile_bf16.hpp"
#include "cpu/similarity/tile_contrast.hpp"
#if defined(PYFEAT_ISA_AVX512_BF16)
#include "cpu/similarity/tile_contrast_bf16.hpp"
#endif
#include "cpu/similarity/tile_float32.hpp"
#include "cpu/similarity/tile_int8.hpp"
#if defined(PYFEAT_ISA_AMX)
#include "cpu/similarity/tile_matrix.hpp"
#endif

namespace pyfeat::PYFEAT_ISA_NAMESPACE {

static_assert(kTileQueries <= kMaxTileQueries && kTileRows <= kMaxTileRows);
static_assert(kGradientRows % kTileQueries == 0 && kGradientColumns % kTileRows == 0);
#if defined(PYFEAT_ISA_AMX)
static_assert(kMatrixQueries <= kMaxTileQueries && kMatrixRows <= kMaxTileRows);
#endif

const Kernels kernels{
    {row_kernels<Float32>(),
     row_kernels<Float64>(),
     row_kernels<Float16>(),
     row_kernels<Bfloat16>()},
#if defined(PYFEAT_ISA_AMX)
    {float32_tiles(), bf16_matrix_tiles(), int8_matrix_tiles()},
#else
    {float32_tiles(), bf16_tiles(), int8_tiles()},
#endif
    power_kernels(),
    float32_contrast(),
#if defined(PYFEAT_ISA_AVX512_BF16)
    bf16_contrast(),
#else
    float32_contrast(),
#endif
#if defined(PYFEAT_ISA_AMX)
    // int8 takes half the time of bf16 in the tiles. But both are fast enough for the float64
    // distances to matter more, and of these the coarser bounds of int8 take up to five times as
    // many.
    {Precision::kFloat32, Precision::kInt8, Precision::kBfloat16},
#elif defined(PYFEAT_ISA_AVX512_BF16)
    {Precision::kFloat32, Precision::kBfloat16, Precision::kInt8},
#elif defined(PYFEAT_ISA_SCALAR) || defined(PYFEAT_ISA_NEON)
    // Without an instruction for sums of byte products, these take more of others than they save.
    {Precision::kInt8, Precision::kBfloat16, Precision::kFloat32},
#else
    {Precision::kBfloat16, Precision::kFloat32, Precision::kInt8},
#endif
};

}  // namespace pyfeat::PYFEAT_ISA_NAMESPACE
