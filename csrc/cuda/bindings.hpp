// SPDX-License-Identifier: Apache-2.0
// What all bindings of the CUDA module share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>

#include "cuda/launch.hpp"
#include "python_arguments.hpp"

namespace pyfeat::cuda {

namespace py = pybind11;

// Deformable attention.
void bind_sampling(py::module_& m);

// device index, address of the stream
using PyQueue = std::pair<int, std::uintptr_t>;
inline Queue to_queue(const PyQueue& queue) {
    return {queue.first, reinterpret_cast<cudaStream_t>(queue.second)};
}

// Nearest neighbours.
void bind_search(py::module_& m);
// Losses over all pairs.
void bind_contrast(py::module_& m);

}  // namespace pyfeat::cuda
