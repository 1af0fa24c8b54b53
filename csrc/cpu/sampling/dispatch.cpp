// SPDX-License-Identifier: Apache-2.0
#include "cpu/sampling/kernels.hpp"

namespace pyfeat {

const SamplingTable& sampling_kernels_for(Isa isa) {
    switch (isa) {
#if defined(PYFEAT_X86)
        case Isa::kAmx:
        case Isa::kAvx512Bf16:
        case Isa::kAvx512Vnni:
        case Isa::kAvx512:
            return avx512::sampling_kernels;
        case Isa::kAvx2Vnni:
        case Isa::kAvx2:
            return avx2::sampling_kernels;
#elif defined(PYFEAT_ARM64)
        case Isa::kNeonDot:
        case Isa::kNeon:
            return neon::sampling_kernels;
#endif
        default:
            return scalar::sampling_kernels;
    }
}

}  // namespace pyfeat
