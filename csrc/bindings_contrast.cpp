// SPDX-License-Identifier: Apache-2.0
// Binds functions, no logic.
#include <cstdint>
#include <string>
#include <tuple>

#include "bindings.hpp"
#include "cpu/similarity/contrast.hpp"
#include "cpu/similarity/log_sum_exp.hpp"

namespace pyfeat {
namespace {

PairTerms bind_pairs(std::uintptr_t column_bias,
                     std::uintptr_t row_ids,
                     std::uintptr_t column_ids,
                     std::uintptr_t row_groups,
                     std::uintptr_t column_groups,
                     bool keep_positives,
                     bool separate_positives) {
    return {to_pointer<const float>(column_bias),
            to_pointer<const std::int32_t>(row_ids),
            to_pointer<const std::int32_t>(column_ids),
            to_pointer<const std::int32_t>(row_groups),
            to_pointer<const std::int32_t>(column_groups),
            keep_positives,
            separate_positives};
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
                      std::uintptr_t column_positives) {
    const LogSumExpParams params{to_rows(a),
                                 to_rows(b),
                                 scale,
                                 product_dtype,
                                 to_pointer<double>(row_lse),
                                 to_pointer<double>(column_lse),
                                 pairs,
                                 to_pointer<double>(row_positives),
                                 to_pointer<double>(column_positives)};
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        log_sum_exp_cpu(params, isa, execution);
        return true;
    });
}

// log-sum-exps, their gradients, and those of the sums over positives: addresses of float64.
using SumAddresses = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

void bind_contrast_gradient(const Matrix& a,
                            const Matrix& b,
                            double scale,
                            const PairTerms& pairs,
                            const SumAddresses& rows,
                            const SumAddresses& columns,
                            std::uintptr_t grad_a,
                            std::uintptr_t grad_b,
                            int num_threads,
                            const std::string& isa_name) {
    const ContrastGradientParams params{to_rows(a),
                                        to_rows(b),
                                        scale,
                                        pairs,
                                        to_pointer<const double>(std::get<0>(rows)),
                                        to_pointer<const double>(std::get<0>(columns)),
                                        to_pointer<const double>(std::get<1>(rows)),
                                        to_pointer<const double>(std::get<1>(columns)),
                                        to_pointer<const double>(std::get<2>(rows)),
                                        to_pointer<const double>(std::get<2>(columns)),
                                        to_pointer<float>(grad_a),
                                        to_pointer<float>(grad_b)};
    run(num_threads, isa_name, [&](Isa isa, Execution& execution) {
        contrast_gradient_cpu(params, isa, execution);
        return true;
    });
}

}  // namespace

void bind_contrast(py::module_& m) {
    py::class_<PairTerms>(m, "PairTerms")
        .def(py::init(&bind_pairs),
             py::arg("column_bias") = 0,
             py::arg("row_ids") = 0,
             py::arg("column_ids") = 0,
             py::arg("row_groups") = 0,
             py::arg("column_groups") = 0,
             py::arg("keep_positives") = false,
             py::arg("separate_positives") = false);

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
          py::arg("column_positives") = 0);
    m.def("contrast_gradient_cpu",
          &bind_contrast_gradient,
          py::arg("a"),
          py::arg("b"),
          py::arg("scale"),
          py::arg("pairs"),
          py::arg("rows"),
          py::arg("columns"),
          py::arg("grad_a"),
          py::arg("grad_b"),
          py::arg("num_threads"),
          py::arg("isa") = "");
}

}  // namespace pyfeat
