// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic.
#include "cuda/bindings.hpp"
#include "cuda/similarity/knn.hpp"

namespace pyfeat::cuda {
namespace {

// addresses of mean, scale and shift
using PyFrame = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;
DeviceFrame to_frame(const PyFrame& frame) {
    return {to_pointer<const double>(std::get<0>(frame)),
            to_pointer<const double>(std::get<1>(frame)),
            to_pointer<const double>(std::get<2>(frame))};
}

// first row, one past the last, address of what is packed
using PyPart = std::tuple<std::int64_t, std::int64_t, std::uintptr_t>;
// address and stride from one query to the next; address 0: no mask
using PyMask = std::pair<std::uintptr_t, std::int64_t>;
// addresses of distances and indices, dtype of distances
using PyOutputs = std::tuple<std::uintptr_t, std::uintptr_t, Dtype>;

void bind_pack(const Matrix& memory,
               const PyPart& part,
               std::uintptr_t allowed,
               Metric metric,
               const PyFrame& frame,
               const PyQueue& queue) {
    const auto& [first, end, packed] = part;
    pack_memory({to_rows(memory),
                 first,
                 end,
                 to_pointer<const std::uint8_t>(allowed),
                 metric,
                 to_frame(frame),
                 to_pointer<void>(packed)},
                to_queue(queue));
}

void bind_knn(const Matrix& queries,
              const Matrix& memory,
              const PyPart& part,
              std::int64_t k,
              Metric metric,
              const PyMask& mask,
              const PyFrame& frame,
              std::uintptr_t workspace,
              bool begins,
              bool ends,
              const PyOutputs& outputs,
              const PyQueue& queue,
              double bound_scale) {
    const auto& [first, end, packed] = part;
    const auto& [distances, indices, dtype] = outputs;
    knn({to_rows(queries),
         to_rows(memory),
         first,
         end,
         to_pointer<void>(packed),
         metric,
         {to_pointer<const std::uint8_t>(mask.first), mask.second},
         to_frame(frame),
         k,
         to_pointer<void>(workspace),
         begins,
         ends,
         {to_pointer<void>(distances), dtype, to_pointer<std::int64_t>(indices)},
         bound_scale},
        to_queue(queue));
}

}  // namespace

void bind_search(py::module_& m) {
    m.attr("MAX_NEIGHBOURS") = kMostNeighbours;
    m.def("packed_bytes", &packed_bytes, py::arg("num_rows"), py::arg("dim"));
    m.def(
        "workspace_bytes", &workspace_bytes, py::arg("num_queries"), py::arg("dim"), py::arg("k"));
    m.def("count_offsets", &count_offsets, py::arg("num_queries"), py::arg("dim"), py::arg("k"));
    m.def("pack_memory",
          &bind_pack,
          py::arg("memory"),
          py::arg("part"),
          py::arg("allowed"),
          py::arg("metric"),
          py::arg("frame"),
          py::arg("queue"));
    m.def("knn",
          &bind_knn,
          py::arg("queries"),
          py::arg("memory"),
          py::arg("part"),
          py::arg("k"),
          py::arg("metric"),
          py::arg("mask"),
          py::arg("frame"),
          py::arg("workspace"),
          py::arg("begins"),
          py::arg("ends"),
          py::arg("outputs"),
          py::arg("queue"),
          py::arg("bound_scale") = 1.0);
}

}  // namespace pyfeat::cuda
