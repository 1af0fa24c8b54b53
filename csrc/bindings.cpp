// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic. A matrix crosses as (address, rows, columns, row stride in elements).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/similarity/farthest.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/select.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace py = pybind11;

namespace pyfeat {
namespace {

using Matrix = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;

Rows to_rows(const Matrix& matrix) {
    const auto& [address, num_rows, dim, stride] = matrix;
    return {reinterpret_cast<const float*>(address), num_rows, dim, stride};
}

template <typename T>
T* to_pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

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

std::pair<std::int64_t, std::int64_t> bind_knn(const Matrix& queries,
                                               const Matrix& memory,
                                               std::int64_t k,
                                               Metric metric,
                                               std::uintptr_t distances,
                                               std::uintptr_t indices,
                                               int num_threads,
                                               const std::string& isa_name,
                                               const PackedMemory* packed) {
    const KnnParams params{to_rows(queries),
                           to_rows(memory),
                           k,
                           metric,
                           to_pointer<float>(distances),
                           to_pointer<std::int64_t>(indices)};
    const KnnCounters counters = run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        return knn_cpu(params, packed, isa, execution);
    });
    return {counters.reranked, counters.exhaustive};
}

std::unique_ptr<PackedMemory> bind_pack(const Matrix& memory,
                                        Metric metric,
                                        int num_threads,
                                        const std::string& isa_name) {
    return run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        return std::make_unique<PackedMemory>(to_rows(memory), metric, isa, execution);
    });
}

std::tuple<std::int64_t, std::int64_t, std::int64_t> bind_farthest(const Matrix& rows,
                                                                   std::uintptr_t squared_distances,
                                                                   std::uintptr_t owners,
                                                                   std::uintptr_t picks,
                                                                   std::uintptr_t squared_radii,
                                                                   std::int64_t first_pick,
                                                                   std::int64_t num_picks,
                                                                   double stop_squared_radius,
                                                                   int num_threads,
                                                                   const std::string& isa_name) {
    const FarthestParams params{to_rows(rows),
                                to_pointer<double>(squared_distances),
                                to_pointer<std::int32_t>(owners),
                                to_pointer<std::int64_t>(picks),
                                to_pointer<double>(squared_radii),
                                first_pick,
                                num_picks,
                                stop_squared_radius};
    const FarthestResult result = run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        return farthest_cpu(params, isa, execution);
    });
    return {result.num_done, result.next_pick, result.num_distances};
}

void bind_check_finite(const Matrix& rows, const std::string& name, int num_threads) {
    run(num_threads, "", [&](Isa isa, Execution& execution) {
        check_finite(to_rows(rows), name.c_str(), kernels_for(isa), execution);
        return true;
    });
}

std::vector<std::string> bind_isas() {
    std::vector<std::string> names;
    for (const Isa isa : available_isas()) {
        names.emplace_back(isa_name(isa));
    }
    return names;
}

}  // namespace
}  // namespace pyfeat

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using namespace pyfeat;
    m.attr("__version__") = PYFEAT_VERSION;

    py::enum_<Metric>(m, "Metric")
        .value("euclidean", Metric::kEuclidean)
        .value("sqeuclidean", Metric::kSquaredEuclidean)
        .value("cosine", Metric::kCosine)
        .value("inner_product", Metric::kInnerProduct);

    py::class_<PackedMemory>(m, "PackedMemory")
        .def(py::init(&bind_pack),
             py::arg("memory"),
             py::arg("metric"),
             py::arg("num_threads"),
             py::arg("isa") = "");

    m.def("isas", &bind_isas);
    m.def("check_finite",
          &bind_check_finite,
          py::arg("rows"),
          py::arg("name"),
          py::arg("num_threads"));
    m.def("knn_cpu",
          &bind_knn,
          py::arg("queries"),
          py::arg("memory"),
          py::arg("k"),
          py::arg("metric"),
          py::arg("distances"),
          py::arg("indices"),
          py::arg("num_threads"),
          py::arg("isa") = "",
          py::arg("packed") = nullptr);
    m.def("farthest_cpu",
          &bind_farthest,
          py::arg("rows"),
          py::arg("squared_distances"),
          py::arg("owners"),
          py::arg("picks"),
          py::arg("squared_radii"),
          py::arg("first_pick"),
          py::arg("num_picks"),
          py::arg("stop_squared_radius"),
          py::arg("num_threads"),
          py::arg("isa") = "");
}
