// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic.
#include "cuda/bindings.hpp"

#include "cuda/build.hpp"

namespace py = pybind11;

// Enumerations are those of pyfeat._C, under the same names, and of this module alone: two modules
// cannot both register one type.
PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
    using namespace pyfeat;
    m.attr("__version__") = PYFEAT_VERSION;

    py::enum_<Metric>(m, "Metric", py::module_local())
        .value("euclidean", Metric::kEuclidean)
        .value("sqeuclidean", Metric::kSquaredEuclidean)
        .value("cosine", Metric::kCosine)
        .value("inner_product", Metric::kInnerProduct);

    py::enum_<Dtype>(m, "Dtype", py::module_local())
        .value("float32", Dtype::kFloat32)
        .value("float64", Dtype::kFloat64)
        .value("float16", Dtype::kFloat16)
        .value("bfloat16", Dtype::kBfloat16);

    m.def("architectures", &cuda::architectures);
    m.def("runtime_version", &cuda::runtime_version);
    m.def("driver_version", &cuda::driver_version);
    cuda::bind_search(m);
    cuda::bind_sampling(m);
    cuda::bind_contrast(m);
}
