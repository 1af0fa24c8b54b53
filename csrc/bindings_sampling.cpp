// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic.
#include <cstdint>
#include <string>
#include <tuple>

#include "bindings.hpp"
#include "cpu/sampling/deform_attn.hpp"
#include "deform_attn_arguments.hpp"

namespace pyfeat {
namespace {

void bind_forward(const PyValue& value,
                  const PySizes& sizes,
                  const PyLevels& levels,
                  const PyPoints& locations,
                  const PyPoints& weights,
                  std::uintptr_t output,
                  int num_threads,
                  const std::string& isa_name) {
    const DeformAttnParams params = to_params(value, sizes, levels, locations, weights);
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        deform_attn_cpu(params, to_pointer<void>(output), isa, execution);
        return true;
    });
}

void bind_backward(const PyValue& value,
                   const PySizes& sizes,
                   const PyLevels& levels,
                   const PyPoints& locations,
                   const PyPoints& weights,
                   std::uintptr_t upstream,
                   const PyAddresses& gradients,
                   int num_threads,
                   const std::string& isa_name) {
    const DeformAttnParams params = to_params(value, sizes, levels, locations, weights);
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        deform_attn_backward_cpu(params, to_gradients(upstream, gradients), isa, execution);
        return true;
    });
}

void bind_second(const PyValue& value,
                 const PySizes& sizes,
                 const PyLevels& levels,
                 const PyPoints& locations,
                 const PyPoints& weights,
                 std::uintptr_t upstream,
                 const PyAddresses& cotangents,
                 const std::tuple<PyAddresses, std::uintptr_t>& gradients,
                 int num_threads,
                 const std::string& isa_name) {
    const DeformAttnParams params = to_params(value, sizes, levels, locations, weights);
    const DeformAttnSecond second{to_pointer<void>(std::get<0>(cotangents)),
                                  to_pointer<void>(std::get<1>(cotangents)),
                                  to_pointer<void>(std::get<2>(cotangents)),
                                  to_pointer<void>(std::get<1>(gradients))};
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        deform_attn_second_cpu(
            params, second, to_gradients(upstream, std::get<0>(gradients)), isa, execution);
        return true;
    });
}

}  // namespace

void bind_sampling(py::module_& m) {
    const auto def = [&m](const char* name, auto function, auto... arguments) {
        m.def(name,
              function,
              py::arg("value"),
              py::arg("sizes"),
              py::arg("levels"),
              py::arg("locations"),
              py::arg("weights"),
              arguments...,
              py::arg("num_threads"),
              py::arg("isa") = "");
    };
    def("deform_attn_cpu", bind_forward, py::arg("output"));
    def("deform_attn_backward_cpu", bind_backward, py::arg("grad_output"), py::arg("gradients"));
    def("deform_attn_second_cpu",
        bind_second,
        py::arg("grad_output"),
        py::arg("cotangents"),
        py::arg("gradients"));
}

}  // namespace pyfeat
