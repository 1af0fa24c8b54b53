// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"
#include "cpu/similarity/kernels.hpp"

namespace pyfeat {

const Kernels& kernels_for(Isa isa) {
    switch (isa) {
#if defined(PYFEAT_AMX)
        case Isa::kAmx:
            return amx::kernels;
#endif
#if defined(PYFEAT_X86)
        case Isa::kAvx512Bf16:
            return avx512_bf16::kernels;
        case Isa::kAvx512Vnni:
            return avx512_vnni::kernels;
        case Isa::kAvx512:
            return avx512::kernels;
        case Isa::kAvx2Vnni:
            return avx2_vnni::kernels;
        case Isa::kAvx2:
            return avx2::kernels;
#elif defined(PYFEAT_ARM64)
        case Isa::kNeonDot:
            return neon_dot::kernels;
        case Isa::kNeon:
            return neon::kernels;
#endif
        default:
            return scalar::kernels;
    }
}

const char* precision_name(Precision precision) {
    switch (precision) {
        case Precision::kInt8:
            return "int8";
        case Precision::kBfloat16:
            return "bf16";
        case Precision::kFloat32:
            break;
    }
    return "float32";
}

Precision resolve_precision(const std::string& name, Isa isa, std::int64_t dim) {
    const Kernels& kernels = kernels_for(isa);
    for (int i = kNumPrecisions - 1; i >= 0; --i) {
        const Precision precision = kernels.order[i];
        const bool fits = dim <= kernels.tile_kernels(precision).largest_dim;
        if (name.empty() ? fits : name == precision_name(precision)) {
            PYFEAT_CHECK(fits,
                         name,
                         " tiles take at most ",
                         kernels.tile_kernels(precision).largest_dim,
                         " features, got ",
                         dim);
            return precision;
        }
    }
    // Wider rows than any tile takes: the caller searches without tiles.
    PYFEAT_CHECK(name.empty(), "precision must be one of float32, bf16, int8, got ", name);
    return Precision::kFloat32;
}

}  // namespace pyfeat
