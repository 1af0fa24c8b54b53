// SPDX-License-Identifier: Apache-2.0
// Checks the sampling kernels of one instruction set in float against the scalar ones in double,
// without Python: it also runs under an emulator. Prints what is wrong; exits with 1 then.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpu/sampling/kernels.hpp"
#include "cpu/sampling/points_table.hpp"

// What is checked; checked.cpp says of which instruction set.
extern const pyfeat::SamplingTable& checked_sampling;

namespace {

using namespace pyfeat;

int num_wrong = 0;

// A level or two of one head, and points of some queries.
struct Case {
    DeformAttnParams params;
    std::vector<double> value, locations, weights, upstream;
};

// What a kernel returns, all of it.
struct Answer {
    std::vector<double> output, value, locations, weights, second;
};

Case make_case(int num_dims, std::int64_t dim, std::mt19937& random) {
    Case made;
    DeformAttnParams& params = made.params;
    params = DeformAttnParams{};
    params.num_dims = num_dims;
    params.dim = dim;
    params.num_queries = 5;
    const std::int64_t sizes[2][3] = {{7, 5, 4}, {3, 6, 2}};
    for (const auto& level : sizes) {
        std::int64_t cells = 1;
        for (int j = 0; j < num_dims; ++j) {
            params.shapes.push_back(level[j]);
            cells *= level[j];
        }
        params.num_cells += cells;
    }
    params.num_points = {3, 15};
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> anywhere(-0.3F, 1.3F);
    const auto fill = [&](std::vector<double>& values, std::int64_t count, auto& distribution) {
        values.resize(static_cast<std::size_t>(count));
        for (double& value : values) {
            value = static_cast<double>(distribution(random));
        }
    };
    const std::int64_t points = params.num_queries * 18;
    fill(made.value, params.num_cells * dim, normal);
    fill(made.locations, points * num_dims, anywhere);
    fill(made.weights, points, normal);
    fill(made.upstream, params.num_queries * dim, normal);
    made.locations[0] = NAN;
    made.locations[static_cast<std::size_t>(num_dims)] = INFINITY;
    return made;
}

template <typename Real>
std::vector<Real> as(const std::vector<double>& values) {
    std::vector<Real> converted;
    for (const double value : values) {
        converted.push_back(static_cast<Real>(value));
    }
    return converted;
}

template <typename Real>
Answer answer_of(const SamplingKernels<Real>& kernels, const Case& given) {
    const DeformAttnParams& params = given.params;
    const FilledPointTable<Real> table(params);
    const PointTable<Real>& points = table.points();
    const std::int64_t queries = params.num_queries, dim = params.dim, n = params.num_dims;
    const std::int64_t count = points.num_points;
    const auto value = as<Real>(given.value), locations = as<Real>(given.locations),
               weights = as<Real>(given.weights), upstream = as<Real>(given.upstream);
    const auto room = static_cast<std::size_t>(dim);
    std::vector<Real> nothing(room), spilt(room);
    // A block of scratch that begins at a multiple of 64 bytes.
    std::vector<double> memory(static_cast<std::size_t>(scratch_size(points)) + 8);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    double* scratch = memory.data() + (64 - address % 64) % 64 / 8;

    const Samples<Real> samples{queries, locations.data(), count * n, weights.data(), count};
    const Cells<const Real> cells{value.data(), dim, nothing.data()};
    const Features<const Real> by_output{upstream.data(), dim};
    std::vector<Real> output(upstream.size()), by_value(value.size()),
        by_locations(locations.size()), by_weights(weights.size()), second(upstream.size());
    kernels.gather(points, samples, cells, dim, {output.data(), dim}, scratch);
    SampleGradients<Real> gradients{{by_value.data(), dim, spilt.data()},
                                    0,
                                    dim,
                                    {by_locations.data(), count * n},
                                    {by_weights.data(), count}};
    kernels.gradients(points, samples, cells, dim, by_output, gradients, scratch);
    Answer answer;
    const auto keep = [](const std::vector<Real>& values) {
        return std::vector<double>(values.begin(), values.end());
    };
    answer.output = keep(output);
    answer.value = keep(by_value);
    answer.locations = keep(by_locations);
    answer.weights = keep(by_weights);
    if (!points.softmax) {
        std::vector<Real> more_value(value.size()), more_locations(locations.size()),
            more_weights(weights.size());
        gradients.value.data = more_value.data();
        gradients.locations.data = more_locations.data();
        gradients.weights.data = more_weights.data();
        // The values stand in for the cotangents of their gradient, likewise the weights; locations
        // hold NaN, so theirs are 1.
        const std::vector<Real> ones(locations.size(), Real{1});
        const SecondOrder<Real> order{
            cells, {ones.data(), count * n}, {weights.data(), count}, {second.data(), dim}};
        kernels.second(points, samples, cells, dim, by_output, order, gradients, scratch);
        for (const auto* values : {&second, &more_value, &more_locations, &more_weights}) {
            answer.second.insert(answer.second.end(), values->begin(), values->end());
        }
    }
    return answer;
}

void compare(const std::vector<double>& ours,
             const std::vector<double>& right,
             const std::string& what) {
    double largest = 0.0, worst = 0.0;
    bool wrong = ours.size() != right.size();
    for (std::size_t i = 0; i < right.size() && !wrong; ++i) {
        largest = std::max(largest, std::abs(right[i]));
        worst = std::max(worst, std::abs(ours[i] - right[i]));
        wrong = !std::isfinite(ours[i]);
    }
    // A location is rounded by 2^-24 of up to 9 cells.
    if (wrong || worst > 2e-5 * (1.0 + largest)) {
        std::printf("%s is off by %g of %g\n", what.c_str(), worst, largest);
        ++num_wrong;
    }
}

}  // namespace

int main() {
    std::mt19937 random(1);
    for (int num_dims = 1; num_dims <= kMaxDims; ++num_dims) {
        for (const std::int64_t dim : {1, 5, 16, 20, 32, 100}) {
            for (int options = 0; options < 16; ++options) {
                Case given = make_case(num_dims, dim, random);
                given.params.border = (options & 1) != 0;
                given.params.align_corners = (options & 2) != 0;
                given.params.discrete = (options & 4) != 0;
                given.params.softmax = (options & 8) != 0;
                const Answer ours = answer_of(checked_sampling.of<float>(), given);
                const Answer right = answer_of(scalar::sampling_kernels.of<double>(), given);
                const std::string where = " of " + std::to_string(num_dims) +
                                          "-D, D = " + std::to_string(dim) + ", options " +
                                          std::to_string(options);
                compare(ours.output, right.output, "output" + where);
                compare(ours.value, right.value, "gradient by values" + where);
                compare(ours.locations, right.locations, "gradient by locations" + where);
                compare(ours.weights, right.weights, "gradient by weights" + where);
                compare(ours.second, right.second, "second gradient" + where);
            }
        }
    }
    std::printf("%d wrong\n", num_wrong);
    return num_wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
