// SPDX-License-Identifier: Apache-2.0
// Binds losses over all pairs, no logic.
#include "cuda/bindings.hpp"
#include "cuda/similarity/contrast.hpp"

namespace pyfeat::cuda {
namespace {

// addresses of a and b, dtype, rows, columns, width
using PyPair =
    std::tuple<std::uintptr_t, std::uintptr_t, Dtype, std::int64_t, std::int64_t, std::int64_t>;
PackedPair to_pair(const PyPair& pair) {
    const auto& [a, b, dtype, num_rows, num_columns, width] = pair;
    return {
        to_pointer<const void>(a), to_pointer<const void>(b), dtype, num_rows, num_columns, width};
}

// addresses of bias, row ids, column ids, row groups, column groups; keep, separate, only positives
using PyTerms = std::tuple<std::uintptr_t,
                           std::uintptr_t,
                           std::uintptr_t,
                           std::uintptr_t,
                           std::uintptr_t,
                           bool,
                           bool,
                           bool>;
PairTerms to_terms(const PyTerms& terms) {
    const auto& [bias, row_ids, column_ids, row_groups, column_groups, keep, separate, only] =
        terms;
    return {to_pointer<const float>(bias),
            to_pointer<const std::int32_t>(row_ids),
            to_pointer<const std::int32_t>(column_ids),
            to_pointer<const std::int32_t>(row_groups),
            to_pointer<const std::int32_t>(column_groups),
            keep,
            separate,
            only};
}

// address, row stride
using PyBlock = std::pair<std::uintptr_t, std::int64_t>;
GradientBlock to_block(const PyBlock& block) {
    return {to_pointer<void>(block.first), block.second};
}

// address, from one of the three to the next
using PyLineTerms = std::pair<std::uintptr_t, std::int64_t>;

}  // namespace

void bind_contrast(py::module_& m) {
    m.def(
        "packed_shape",
        [](Dtype dtype, std::int64_t num_rows, std::int64_t dim) {
            const PackedShape shape = packed_shape(dtype, num_rows, dim);
            return std::make_pair(shape.num_rows, shape.width);
        },
        py::arg("dtype"),
        py::arg("num_rows"),
        py::arg("dim"));
    m.def(
        "pack_features",
        [](const Matrix& features, std::uintptr_t packed, const PyQueue& queue) {
            pack_features(to_rows(features), to_pointer<void>(packed), to_queue(queue));
        },
        py::arg("features"),
        py::arg("packed"),
        py::arg("queue"));
    m.def(
        "pair_tile_shape",
        [](Dtype dtype, const PyQueue& queue) {
            const PairTileShape shape = pair_tile_shape(dtype, to_queue(queue));
            return std::make_tuple(shape.num_rows, shape.num_columns, shape.num_lines);
        },
        py::arg("dtype"),
        py::arg("queue"));
    m.def(
        "plan_pairs",
        [](const PyPair& pair, const PyQueue& queue) {
            const PairPlan plan = plan_pairs(to_pair(pair), to_queue(queue));
            return std::make_tuple(plan.row_slots, plan.column_slots, plan.sums);
        },
        py::arg("pair"),
        py::arg("queue"));
    m.def(
        "pair_sums",
        [](const PyPair& pair,
           const PyTerms& pairs,
           std::uintptr_t scale,
           std::uintptr_t row_parts,
           std::uintptr_t column_parts,
           bool ids,
           bool largest,
           bool on_diagonal,
           const PyQueue& queue) {
            pair_sums({to_pair(pair),
                       to_terms(pairs),
                       to_pointer<const double>(scale),
                       to_pointer<float>(row_parts),
                       to_pointer<float>(column_parts),
                       ids,
                       largest,
                       on_diagonal},
                      to_queue(queue));
        },
        py::arg("pair"),
        py::arg("pairs"),
        py::arg("scale"),
        py::arg("row_parts"),
        py::arg("column_parts"),
        py::arg("ids"),
        py::arg("largest"),
        py::arg("on_diagonal"),
        py::arg("queue"));
    m.def(
        "merge_sums",
        [](std::uintptr_t parts,
           std::int64_t num_slots,
           std::int64_t num_lines,
           std::uintptr_t lse,
           std::uintptr_t positives,
           std::uintptr_t largest,
           const PyQueue& queue) {
            merge_sums({to_pointer<const float>(parts),
                        num_slots,
                        num_lines,
                        to_pointer<double>(lse),
                        to_pointer<double>(positives),
                        to_pointer<double>(largest)},
                       to_queue(queue));
        },
        py::arg("parts"),
        py::arg("num_slots"),
        py::arg("num_lines"),
        py::arg("lse"),
        py::arg("positives"),
        py::arg("largest"),
        py::arg("queue"));
    m.def(
        "gradient_terms",
        [](std::uintptr_t lse,
           std::uintptr_t weights,
           std::uintptr_t positives,
           std::uintptr_t factor,
           std::uintptr_t terms,
           std::int64_t num_lines,
           const PyQueue& queue) {
            gradient_terms({to_pointer<const double>(lse),
                            to_pointer<const double>(weights),
                            to_pointer<const double>(positives),
                            to_pointer<const double>(factor),
                            to_pointer<float>(terms),
                            num_lines},
                           to_queue(queue));
        },
        py::arg("lse"),
        py::arg("weights"),
        py::arg("positives"),
        py::arg("factor"),
        py::arg("terms"),
        py::arg("num_lines"),
        py::arg("queue"));
    m.def(
        "pair_gradient",
        [](const PyPair& pair,
           const PyTerms& pairs,
           std::uintptr_t scale,
           const PyLineTerms& row_terms,
           const PyLineTerms& column_terms,
           const PyBlock& gradient,
           std::uintptr_t sums,
           const PyQueue& queue) {
            pair_gradient({to_pair(pair),
                           to_terms(pairs),
                           to_pointer<const double>(scale),
                           to_pointer<const float>(row_terms.first),
                           to_pointer<const float>(column_terms.first),
                           row_terms.second,
                           column_terms.second,
                           to_block(gradient),
                           to_pointer<double>(sums)},
                          to_queue(queue));
        },
        py::arg("pair"),
        py::arg("pairs"),
        py::arg("scale"),
        py::arg("row_terms"),
        py::arg("column_terms"),
        py::arg("gradient"),
        py::arg("sums"),
        py::arg("queue"));
    m.def(
        "pair_softplus",
        [](const PyPair& pair,
           const PyTerms& pairs,
           std::uintptr_t scale,
           std::uintptr_t bias,
           std::uintptr_t parts,
           std::uintptr_t weights,
           const PyBlock& gradient,
           const PyQueue& queue) {
            pair_softplus({to_pair(pair),
                           to_terms(pairs),
                           to_pointer<const double>(scale),
                           to_pointer<const double>(bias),
                           to_pointer<float>(parts),
                           to_pointer<const float>(weights),
                           to_block(gradient)},
                          to_queue(queue));
        },
        py::arg("pair"),
        py::arg("pairs"),
        py::arg("scale"),
        py::arg("bias"),
        py::arg("parts"),
        py::arg("weights"),
        py::arg("gradient"),
        py::arg("queue"));
    m.def(
        "add_product",
        [](const PyPair& pair, std::uintptr_t out, std::int64_t stride, const PyQueue& queue) {
            add_product({to_pair(pair), to_pointer<float>(out), stride}, to_queue(queue));
        },
        py::arg("pair"),
        py::arg("out"),
        py::arg("stride"),
        py::arg("queue"));
}

}  // namespace pyfeat::cuda
