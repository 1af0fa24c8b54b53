// SPDX-License-Identifier: Apache-2.0
// What all bindings of the CUDA module share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "cuda/launch.hpp"
#include "params.hpp"

namespace pyfeat::cuda {

namespace py = pybind11;

// Deformable attention.
void bind_sampling(py::module_& m);

// device index, address of the stream
using PyQueue = std::pair<int, std::uintptr_t>;
inline Queue to_queue(const PyQueue& queue) {
    return {queue.first, reinterpret_cast<cudaStream_t>(queue.second)};
}

// address, rows, columns, row stride in elements, dtype
using Matrix = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, Dtype>;
inline Rows to_rows(const Matrix& matrix) {
    const auto& [address, num_rows, dim, stride, dtype] = matrix;
    return {reinterpret_cast<const void*>(address), dtype, num_rows, dim, stride};
}

template <typename T>
T* to_pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Nearest neighbours.
void bind_search(py::module_& m);
// Losses over all pairs.
void bind_contrast(py::module_& m);

}  // namespace pyfeat::cuda
