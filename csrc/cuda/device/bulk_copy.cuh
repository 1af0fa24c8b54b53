// SPDX-License-Identifier: Apache-2.0
// Copies of whole blocks of memory by the copy engine, from compute capability 9.0 on.
#pragma once

#include <cstdint>

#include "cuda/device/shared.cuh"

namespace pyfeat::cuda {

// From global to shared memory, both 16-byte aligned, `bytes` a multiple of 16; counted by
// `barrier` in the same thread block.
__device__ inline void bulk_copy(void* shared,
                                 const void* global,
                                 int bytes,
                                 std::uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(shared)),
        "l"(global),
        "r"(bytes),
        "r"(shared_address(barrier))
        : "memory");
}

}  // namespace pyfeat::cuda
