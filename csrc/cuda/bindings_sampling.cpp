// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic.
#include <sstream>
#include <string>

#include "cuda/bindings.hpp"
#include "cuda/sampling/deform_attn.hpp"
#include "deform_attn_arguments.hpp"
#include "sampling/levels.hpp"

namespace pyfeat::cuda {
namespace {

// The first query of B Q, and the one behind the last.
using Part = std::pair<Size, Size>;

Site site_of(const DeformAttnParams& params, const PyQueue& queue) {
    std::ostringstream shapes;
    shapes << "value [" << params.batch << ", " << params.num_cells << ", " << params.heads << ", "
           << params.dim << "], " << params.num_queries << " queries, " << params.num_points.size()
           << " levels";
    return {"deform_attn", shapes.str(), to_queue(queue)};
}

// run(params, site) on the device of the queue.
template <typename Run>
void on_device(const PyValue& value,
               const PySizes& sizes,
               const PyLevels& levels,
               const PyPoints& locations,
               const PyPoints& weights,
               const PyQueue& queue,
               Run run) {
    const DeformAttnParams params = to_params(value, sizes, levels, locations, weights);
    const Site site = site_of(params, queue);
    const DeviceGuard guard(site);
    run(params, site);
}

void bind_forward(const PyValue& value,
                  const PySizes& sizes,
                  const PyLevels& levels,
                  const PyPoints& locations,
                  const PyPoints& weights,
                  std::uintptr_t output,
                  const PyQueue& queue) {
    on_device(value, sizes, levels, locations, weights, queue, [&](auto& params, auto& site) {
        gather(params, to_pointer<void>(output), site);
    });
}

void bind_backward(const PyValue& value,
                   const PySizes& sizes,
                   const PyLevels& levels,
                   const PyPoints& locations,
                   const PyPoints& weights,
                   std::uintptr_t upstream,
                   const PyAddresses& gradients,
                   const PyQueue& queue) {
    on_device(value, sizes, levels, locations, weights, queue, [&](auto& params, auto& site) {
        gather_gradients(params, to_gradients(upstream, gradients), site);
    });
}

void bind_count_terms(const PyValue& value,
                      const PySizes& sizes,
                      const PyLevels& levels,
                      const PyPoints& locations,
                      const PyPoints& weights,
                      const Part& part,
                      std::uintptr_t counts,
                      const PyQueue& queue) {
    on_device(value, sizes, levels, locations, weights, queue, [&](auto& params, auto& site) {
        count_terms(params, {part.first, part.second}, to_pointer<std::int32_t>(counts), site);
    });
}

void bind_gather_terms(const PyValue& value,
                       const PySizes& sizes,
                       const PyLevels& levels,
                       const PyPoints& locations,
                       const PyPoints& weights,
                       const Part& part,
                       std::uintptr_t ends,
                       std::uintptr_t terms,
                       std::uintptr_t upstream,
                       std::uintptr_t by_value,
                       const PyQueue& queue) {
    on_device(value, sizes, levels, locations, weights, queue, [&](auto& params, auto& site) {
        gather_terms(params,
                     {part.first, part.second},
                     to_pointer<std::int32_t>(ends),
                     to_pointer<void>(terms),
                     to_gradients(upstream, {by_value, 0, 0}),
                     site);
    });
}

}  // namespace

void bind_sampling(py::module_& m) {
    const auto def = [&m](const char* name, auto function, auto... arguments) {
        m.def(name,
              function,
              py::call_guard<py::gil_scoped_release>(),
              py::arg("value"),
              py::arg("sizes"),
              py::arg("levels"),
              py::arg("locations"),
              py::arg("weights"),
              arguments...,
              py::arg("queue"));
    };
    def("deform_attn", bind_forward, py::arg("output"));
    def("deform_attn_backward", bind_backward, py::arg("grad_output"), py::arg("gradients"));
    def("deform_attn_count_terms", bind_count_terms, py::arg("part"), py::arg("counts"));
    def("deform_attn_gather_terms",
        bind_gather_terms,
        py::arg("part"),
        py::arg("ends"),
        py::arg("terms"),
        py::arg("grad_output"),
        py::arg("by_value"));
    m.attr("MAX_LEVELS") = kMaxLevels;
}

}  // namespace pyfeat::cuda
