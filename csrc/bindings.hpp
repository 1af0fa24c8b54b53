// SPDX-License-Identifier: Apache-2.0
// What all bindings share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "cpu/isa.hpp"
#include "cpu/threads.hpp"
#include "python_arguments.hpp"

namespace pyfeat {

namespace py = pybind11;

// Sums over all pairs and their gradients.
void bind_contrast(py::module_& m);
// Deformable attention.
void bind_sampling(py::module_& m);

// Runs work(isa, execution) without the interpreter's lock; Ctrl-C stops it.
template <typename Work>
auto run(int num_threads, const std::string& isa_name, Work work) {
    const Isa isa = resolve_isa(isa_name);
    Execution execution(num_threads, [] {
        const py::gil_scoped_acquire lock;
        return PyErr_CheckSignals() != 0;
    });
    try {
        const py::gil_scoped_release release;
        return work(isa, execution);
    } catch (const Interrupted&) {
        throw py::error_already_set();
    }
}

}  // namespace pyfeat
