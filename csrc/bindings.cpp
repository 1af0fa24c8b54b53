// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic.
#include "bindings.hpp"

#include <pybind11/numpy.h>
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
#include "cpu/similarity/search.hpp"
#include "cpu/similarity/select.hpp"
#include "cpu/similarity/within.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace py = pybind11;

namespace pyfeat {
namespace {

// address and stride from one query to the next; address 0: no mask
using MaskMatrix = std::pair<std::uintptr_t, std::int64_t>;

SearchParams to_search(const char* op,
                       const Matrix& queries,
                       const Matrix& memory,
                       Metric metric,
                       const MaskMatrix& mask,
                       NonFinite nonfinite,
                       double bound_scale) {
    return {op,
            to_rows(queries),
            to_rows(memory),
            metric,
            {reinterpret_cast<const std::uint8_t*>(mask.first), mask.second},
            nonfinite,
            bound_scale};
}

using Counts = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

Counts to_counts(const SearchCounters& counters) {
    return {counters.reranked, counters.retried, counters.exhaustive};
}

Counts bind_knn(const Matrix& queries,
                const Matrix& memory,
                std::int64_t k,
                Metric metric,
                std::uintptr_t distances,
                Dtype distance_dtype,
                std::uintptr_t indices,
                const MaskMatrix& mask,
                NonFinite nonfinite,
                int num_threads,
                const std::string& isa_name,
                const std::string& precision_name,
                const PackedMemory* packed,
                double bound_scale) {
    const KnnParams params{to_search("knn", queries, memory, metric, mask, nonfinite, bound_scale),
                           k,
                           to_pointer<void>(distances),
                           distance_dtype,
                           to_pointer<std::int64_t>(indices)};
    return run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        const Precision precision = resolve_precision(precision_name, isa, params.memory.dim);
        return to_counts(knn_cpu(params, packed, isa, precision, execution));
    });
}

template <typename T>
py::array_t<T> to_array(std::vector<T>&& values) {
    auto* owned = new std::vector<T>(std::move(values));
    const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple bind_within(const Matrix& queries,
                      const Matrix& memory,
                      double radius,
                      Metric metric,
                      const MaskMatrix& mask,
                      NonFinite nonfinite,
                      int num_threads,
                      const std::string& isa_name,
                      const std::string& precision_name,
                      const PackedMemory* packed,
                      double bound_scale) {
    const RangeParams params{
        to_search("range_search", queries, memory, metric, mask, nonfinite, bound_scale), radius};
    SearchCounters counters;
    RangeResult result = run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        const Precision precision = resolve_precision(precision_name, isa, params.memory.dim);
        return within_cpu(params, packed, isa, precision, execution, counters);
    });
    return py::make_tuple(to_array(std::move(result.offsets)),
                          to_array(std::move(result.distances)),
                          to_array(std::move(result.indices)),
                          to_counts(counters));
}

std::unique_ptr<PackedMemory> bind_pack(const Matrix& memory,
                                        Metric metric,
                                        NonFinite nonfinite,
                                        int num_threads,
                                        const std::string& isa_name,
                                        const std::string& precision_name,
                                        double bound_scale) {
    const Rows rows = to_rows(memory);
    return run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        const Precision precision = resolve_precision(precision_name, isa, rows.dim);
        return std::make_unique<PackedMemory>(
            rows, metric, nonfinite, isa, precision, bound_scale, execution);
    });
}

std::unique_ptr<FarthestSearch> bind_farthest(const Matrix& rows,
                                              std::int64_t start,
                                              std::uintptr_t squared_distances,
                                              const std::string& isa_name,
                                              const std::string& precision_name) {
    const FarthestParams params{to_rows(rows), start, to_pointer<const double>(squared_distances)};
    const Isa isa = resolve_isa(isa_name);
    const Precision precision = resolve_precision(precision_name, isa, params.rows.dim);
    return std::make_unique<FarthestSearch>(params, isa, precision);
}

std::int64_t bind_advance(FarthestSearch& search,
                          std::int64_t num_picks,
                          double stop_squared_radius,
                          std::uintptr_t picks,
                          std::uintptr_t squared_radii,
                          int num_threads) {
    return run(num_threads, "", [&](Isa, Execution& execution) {
        return search.advance(num_picks,
                              stop_squared_radius,
                              to_pointer<std::int64_t>(picks),
                              to_pointer<double>(squared_radii),
                              execution);
    });
}

void bind_power_of_two(std::uintptr_t exponents,
                       std::int64_t count,
                       std::uintptr_t powers,
                       const std::string& isa_name) {
    kernels_for(resolve_isa(isa_name))
        .powers.power_of_two(to_pointer<float>(exponents), count, to_pointer<float>(powers));
}

void bind_check_finite(const Matrix& rows,
                       const std::string& op,
                       const std::string& name,
                       int num_threads) {
    run(num_threads, "", [&](Isa isa, Execution& execution) {
        check_finite(to_rows(rows), op.c_str(), name.c_str(), kernels_for(isa), execution);
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

std::vector<std::string> bind_precisions(const std::string& isa) {
    std::vector<std::string> names;
    for (const Precision precision : kernels_for(resolve_isa(isa)).order) {
        names.emplace_back(precision_name(precision));
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

    py::enum_<Dtype>(m, "Dtype")
        .value("float32", Dtype::kFloat32)
        .value("float64", Dtype::kFloat64)
        .value("float16", Dtype::kFloat16)
        .value("bfloat16", Dtype::kBfloat16);

    py::enum_<NonFinite>(m, "NonFinite")
        .value("refuse", NonFinite::kRefuse)
        .value("skip", NonFinite::kSkip);

    py::class_<PackedMemory>(m, "PackedMemory")
        .def(py::init(&bind_pack),
             py::arg("memory"),
             py::arg("metric"),
             py::arg("nonfinite"),
             py::arg("num_threads"),
             py::arg("isa") = "",
             py::arg("precision") = "",
             py::arg("bound_scale") = 1.0)
        .def_property_readonly(
            "precision", [](const PackedMemory& self) { return precision_name(self.precision); });

    py::class_<FarthestSearch>(m, "FarthestSearch")
        .def(py::init(&bind_farthest),
             py::arg("rows"),
             py::arg("start"),
             py::arg("squared_distances") = 0,
             py::arg("isa") = "",
             py::arg("precision") = "")
        .def("advance",
             &bind_advance,
             py::arg("num_picks"),
             py::arg("stop_squared_radius"),
             py::arg("picks"),
             py::arg("squared_radii"),
             py::arg("num_threads"))
        .def_property_readonly("counts", [](const FarthestSearch& self) {
            const FarthestCounters& counters = self.counters();
            return Counts(counters.distances, counters.products, counters.levels);
        });

    m.def("isas", &bind_isas);
    m.def("precisions", &bind_precisions, py::arg("isa") = "");
    m.def("check_finite",
          &bind_check_finite,
          py::arg("rows"),
          py::arg("op"),
          py::arg("name"),
          py::arg("num_threads"));
    m.def("knn_cpu",
          &bind_knn,
          py::arg("queries"),
          py::arg("memory"),
          py::arg("k"),
          py::arg("metric"),
          py::arg("distances"),
          py::arg("distance_dtype"),
          py::arg("indices"),
          py::arg("mask"),
          py::arg("nonfinite"),
          py::arg("num_threads"),
          py::arg("isa") = "",
          py::arg("precision") = "",
          py::arg("packed") = nullptr,
          py::arg("bound_scale") = 1.0);
    m.def("within_cpu",
          &bind_within,
          py::arg("queries"),
          py::arg("memory"),
          py::arg("radius"),
          py::arg("metric"),
          py::arg("mask"),
          py::arg("nonfinite"),
          py::arg("num_threads"),
          py::arg("isa") = "",
          py::arg("precision") = "",
          py::arg("packed") = nullptr,
          py::arg("bound_scale") = 1.0);
    m.def("power_of_two",
          &bind_power_of_two,
          py::arg("exponents"),
          py::arg("count"),
          py::arg("powers"),
          py::arg("isa") = "");
    bind_contrast(m);
    bind_sampling(m);
}
