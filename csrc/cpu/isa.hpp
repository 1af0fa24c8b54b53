// SPDX-License-Identifier: Apache-2.0
// The instruction sets that the kernels are compiled for, and those that this machine can run.
#pragma once

#include <string>
#include <vector>

namespace pyfeat {

// kAvx512Bf16 has VNNI too: no processor multiplies bfloat16 but not bytes. kAmx has all of these
// beside its matrix units, which multiply both.
enum class Isa {
    kScalar,
    kAvx2,
    kAvx2Vnni,
    kAvx512,
    kAvx512Vnni,
    kAvx512Bf16,
    kAmx,
    kNeon,
    kNeonDot,
};

const char* isa_name(Isa isa);

// Compiled in and runnable here, slowest first.
const std::vector<Isa>& available_isas();

// `name` or, if it is empty, the fastest; throws if this machine cannot run it.
Isa resolve_isa(const std::string& name);

// Bytes of the second-level cache of one core.
long second_level_cache_bytes();

}  // namespace pyfeat
