// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/kernels.hpp"

namespace pyfeat {

const Kernels& kernels_for(Isa isa) {
    switch (isa) {
#if defined(PYFEAT_X86)
        case Isa::kAvx512Bf16:
            return avx512_bf16::kernels;
        case Isa::kAvx512:
            return avx512::kernels;
        case Isa::kAvx2:
            return avx2::kernels;
#endif
        default:
            return scalar::kernels;
    }
}

}  // namespace pyfeat
