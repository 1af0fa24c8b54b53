// SPDX-License-Identifier: Apache-2.0
// Checks of what a kernel touches: asked by the hooks of the compiler and by what is emulated.
#pragma once

#include <cstddef>
#include <cstdint>

#include "state.hpp"

namespace emulated_cuda {

enum class Access { kRead, kWrite, kAtomic, kAtomicRead };

const char* name_of(Access access);
// Fails unless the running thread may touch these bytes and races with no other.
void check(std::uintptr_t address, std::size_t bytes, Access access, Here here);

}  // namespace emulated_cuda
