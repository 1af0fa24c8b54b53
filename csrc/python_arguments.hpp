// SPDX-License-Identifier: Apache-2.0
// Arguments as Python hands them to all compiled modules.
#pragma once

#include <cstdint>
#include <tuple>

#include "params.hpp"

namespace pyfeat {

template <typename T>
T* to_pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// address, rows, columns, row stride in elements, dtype
using Matrix = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, Dtype>;
inline Rows to_rows(const Matrix& matrix) {
    const auto& [address, num_rows, dim, stride, dtype] = matrix;
    return {to_pointer<const void>(address), dtype, num_rows, dim, stride};
}

}  // namespace pyfeat
