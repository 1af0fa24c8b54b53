// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic.
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.hpp"
#include "cpu/blocks.hpp"
#include "cpu/similarity/contrast.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/log_sum_exp.hpp"
#include "cpu/similarity/products.hpp"
#include "cpu/similarity/softplus.hpp"

namespace pyfeat {
namespace {

PairTerms bind_pairs(std::uintptr_t column_bias,
                     std::uintptr_t row_ids,
                     std::uintptr_t column_ids,
                     std::uintptr_t row_groups,
                     std::uintptr_t column_groups,
                     bool keep_positives,
                     bool separate_positives,
                     bool only_positives) {
    return {to_pointer<const float>(column_bias),
            to_pointer<const std::int32_t>(row_ids),
            to_pointer<const std::int32_t>(column_ids),
            to_pointer<const std::int32_t>(row_groups),
            to_pointer<const std::int32_t>(column_groups),
            keep_positives,
            separate_positives,
            only_positives};
}

// Address and number of panels.
using Kept = std::pair<std::uintptr_t, std::int64_t>;

KeptTiles to_kept(const Kept& kept) {
    return {to_pointer<float>(kept.first), kept.second};
}

// Rows and columns of the tiles that features of this dtype are multiplied in.
std::pair<int, int> bind_tile_shape(Dtype dtype, const std::string& isa_name) {
    const ContrastEngine engine(resolve_isa(isa_name), {dtype});
    return {engine.tiles.queries, engine.tiles.rows};
}

void bind_log_sum_exp(const Matrix& a,
                      const Matrix& b,
                      double scale,
                      Dtype product_dtype,
                      std::uintptr_t row_lse,
                      std::uintptr_t column_lse,
                      int num_threads,
                      const std::string& isa_name,
                      const PairTerms& pairs,
                      std::uintptr_t row_positives,
                      std::uintptr_t column_positives,
                      std::uintptr_t row_largest,
                      bool itself,
                      const Kept& kept) {
    const LogSumExpParams params{to_rows(a),
                                 to_rows(b),
                                 scale,
                                 product_dtype,
                                 to_pointer<double>(row_lse),
                                 to_pointer<double>(column_lse),
                                 pairs,
                                 to_pointer<double>(row_positives),
                                 to_pointer<double>(column_positives),
                                 to_pointer<double>(row_largest),
                                 itself,
                                 to_kept(kept)};
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        log_sum_exp_cpu(params, isa, execution);
        return true;
    });
}

// log-sum-exps, their gradients, and those of the sums over positives: addresses of float64.
using SumAddresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;
// Values of A and of B, addresses of the products with dS.
using Products = std::tuple<Matrix, Matrix, std::uintptr_t, std::uintptr_t>;

PairProducts to_products(const Products& products) {
    return {to_rows(std::get<0>(products)),
            to_rows(std::get<1>(products)),
            to_pointer<float>(std::get<2>(products)),
            to_pointer<float>(std::get<3>(products))};
}

void bind_contrast_gradient(const Matrix& a,
                            const Matrix& b,
                            double scale,
                            const PairTerms& pairs,
                            const SumAddresses& rows,
                            const SumAddresses& columns,
                            const Products& products,
                            int num_threads,
                            const std::string& isa_name,
                            bool itself,
                            const Kept& kept) {
    const ContrastGradientParams params{to_rows(a),
                                        to_rows(b),
                                        scale,
                                        pairs,
                                        to_products(products),
                                        to_pointer<const double>(std::get<0>(rows)),
                                        to_pointer<const double>(std::get<0>(columns)),
                                        to_pointer<const double>(std::get<1>(rows)),
                                        to_pointer<const double>(std::get<1>(columns)),
                                        to_pointer<const double>(std::get<2>(rows)),
                                        to_pointer<const double>(std::get<2>(columns)),
                                        itself,
                                        to_kept(kept)};
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        contrast_gradient_cpu(params, isa, execution);
        return true;
    });
}

void bind_softplus(const Matrix& a,
                   const Matrix& b,
                   double scale,
                   double bias,
                   const PairTerms& pairs,
                   std::uintptr_t weights,
                   const std::pair<std::uintptr_t, std::uintptr_t>& sums,
                   const Products& products,
                   int num_threads,
                   const std::string& isa_name) {
    const SoftplusParams params{to_rows(a),
                                to_rows(b),
                                scale,
                                bias,
                                pairs,
                                to_products(products),
                                to_pointer<const double>(weights),
                                to_pointer<double>(sums.first),
                                to_pointer<double>(sums.second)};
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        softplus_cpu(params, isa, execution);
        return true;
    });
}

}  // namespace

void bind_contrast(py::module_& m) {
    py::class_<ReusedFloats>(m, "ReusedFloats", py::buffer_protocol())
        .def(py::init<std::int64_t>(), py::arg("count"))
        .def_buffer([](const ReusedFloats& floats) {
            return py::buffer_info(floats.data(), floats.count());
        })
        .def_static("forget", &ReusedFloats::forget);
    py::class_<PairTerms>(m, "PairTerms")
        .def(py::init(&bind_pairs),
             py::arg("column_bias") = 0,
             py::arg("row_ids") = 0,
             py::arg("column_ids") = 0,
             py::arg("row_groups") = 0,
             py::arg("column_groups") = 0,
             py::arg("keep_positives") = false,
             py::arg("separate_positives") = false,
             py::arg("only_positives") = false);

    m.def("log_sum_exp_cpu",
          &bind_log_sum_exp,
          py::arg("a"),
          py::arg("b"),
          py::arg("scale"),
          py::arg("product_dtype"),
          py::arg("row_lse"),
          py::arg("column_lse"),
          py::arg("num_threads"),
          py::arg("isa") = "",
          py::arg("pairs") = PairTerms(),
          py::arg("row_positives") = 0,
          py::arg("column_positives") = 0,
          py::arg("row_largest") = 0,
          py::arg("itself") = false,
          py::arg("kept") = Kept());
    m.def("contrast_gradient_cpu",
          &bind_contrast_gradient,
          py::arg("a"),
          py::arg("b"),
          py::arg("scale"),
          py::arg("pairs"),
          py::arg("rows"),
          py::arg("columns"),
          py::arg("products"),
          py::arg("num_threads"),
          py::arg("isa") = "",
          py::arg("itself") = false,
          py::arg("kept") = Kept());
    m.def("softplus_cpu",
          &bind_softplus,
          py::arg("a"),
          py::arg("b"),
          py::arg("scale"),
          py::arg("bias"),
          py::arg("pairs"),
          py::arg("weights"),
          py::arg("sums"),
          py::arg("products"),
          py::arg("num_threads"),
          py::arg("isa") = "");
    m.def("tile_shape", &bind_tile_shape, py::arg("dtype"), py::arg("isa") = "");
}

}  // namespace pyfeat
