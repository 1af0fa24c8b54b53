// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/farthest.hpp"

#include <algorithm>
#include <vector>

#include "check.hpp"
#include "cpu/similarity/kernels.hpp"

namespace pyfeat {

namespace {

// A float64 sum of D squares is off by at most (D + 3) 2^-53 of itself, so the computed squares of
// |c - o| and of m stand for the true ones up to this factor each.
double spare(std::int64_t dim) {
    return 1.0 + 4.0 * (static_cast<double>(dim) + 4.0) * 0x1p-53;
}

struct Farthest {
    double squared_distance = -1.0;
    std::int64_t index = -1;
    std::int64_t num_distances = 0;  // computed on the way
};

Farthest farthest_pass(const Rows& rows,
                       const RowKernels& kernels,
                               const double* center,
                               std::int32_t pick,
                               const double* unreachable,
                               double* squared_distances,
                               std::int32_t* owners) {
    // A block at a time: list the rows to look at, look at them, find the largest. Three loops that
    // the processor can run ahead in, where one would mispredict every other row.
    constexpr std::int64_t kBlock = 512;
    constexpr std::int64_t kAhead = 3;  // rows fetched before they are needed
    std::int32_t listed[kBlock + kAhead];
    Farthest farthest;
    for (std::int64_t first = 0; first < rows.num_rows; first += kBlock) {
        const std::int64_t count = rows.num_rows - first < kBlock ? rows.num_rows - first : kBlock;
        double* squared = squared_distances + first;
        std::int32_t* owner = owners + first;
        std::int64_t num_listed = 0;
        for (std::int64_t i = 0; i < count; ++i) {
            listed[num_listed] = static_cast<std::int32_t>(i);
            num_listed += squared[i] > unreachable[owner[i]] ? 1 : 0;
        }
        for (std::int64_t i = num_listed; i < num_listed + kAhead; ++i) {
            listed[i] = 0;
        }
        for (std::int64_t i = 0; i < num_listed; ++i) {
            const std::int64_t at = listed[i];
            const double distance = kernels.squared_distance(center, rows.row(first + at), 1.0, rows.dim);
            if (distance < squared[at]) {
                squared[at] = distance;
                owner[at] = pick;
            }
        }
        for (std::int64_t i = 0; i < count; ++i) {
            if (squared[i] > farthest.squared_distance) {
                farthest.squared_distance = squared[i];
                farthest.index = first + i;
            }
        }
        farthest.num_distances += num_listed;
    }
    return farthest;
}

}  // namespace

FarthestResult farthest_cpu(const FarthestParams& params, Isa isa, Execution& execution) {
    const Rows& rows = params.rows;
    const RowKernels& kernels = kernels_for(isa).row_kernels(rows.dtype);
    constexpr std::int64_t kRowsPerTask = 2048, kPicksPerTask = 256;
    const std::int64_t num_tasks = (rows.num_rows + kRowsPerTask - 1) / kRowsPerTask;
    std::vector<Farthest> farthest(static_cast<std::size_t>(num_tasks));
    std::vector<double> center(static_cast<std::size_t>(rows.dim));
    // [picks so far]: squared distance of a row to its owner below which the new pick is no nearer.
    std::vector<double> unreachable(static_cast<std::size_t>(params.first_pick + params.num_picks));
    const double margin = 1.0 / (4.0 * spare(rows.dim) * spare(rows.dim));

    FarthestResult result;
    result.next_pick = params.picks[params.first_pick];
    for (std::int64_t j = params.first_pick; j < params.first_pick + params.num_picks; ++j) {
        const std::int64_t pick = result.next_pick;
        PYFEAT_CHECK(pick >= 0 && pick < rows.num_rows, "a pick must be in [0, N), got ", pick);
        params.picks[j] = pick;
        params.squared_distances[pick] = -1.0;
        kernels.load(rows.row(pick), 1.0, rows.dim, center.data());

        execution.parallel_for((j + kPicksPerTask) / kPicksPerTask, [&](std::int64_t task, int) {
            const std::int64_t end = std::min(j + 1, (task + 1) * kPicksPerTask);
            for (std::int64_t o = task * kPicksPerTask; o < end; ++o) {
                const void* owner = rows.row(params.picks[o]);
                unreachable[static_cast<std::size_t>(o)] =
                    margin * kernels.squared_distance(center.data(), owner, 1.0, rows.dim);
            }
        });
        if (j == 0) {
            unreachable[0] = -1.0;  // nobody owns the rows yet: look at all but the pick itself
        }
        execution.parallel_for(num_tasks, [&](std::int64_t task, int) {
            const std::int64_t first = task * kRowsPerTask;
            const Rows block{rows.row(first),
                             rows.dtype,
                             std::min(kRowsPerTask, rows.num_rows - first),
                             rows.dim,
                             rows.stride};
            Farthest& found = farthest[static_cast<std::size_t>(task)];
            found = farthest_pass(block, kernels,
                                          center.data(),
                                          static_cast<std::int32_t>(j),
                                          unreachable.data(),
                                          params.squared_distances + first,
                                          params.owners + first);
            found.index += first;
        });

        Farthest best;
        for (const Farthest& found : farthest) {
            result.num_distances += found.num_distances;
            if (found.squared_distance > best.squared_distance) {
                best = found;
            }
        }
        params.squared_radii[j] = std::max(best.squared_distance, 0.0);
        ++result.num_done;
        result.next_pick = best.index;
        if (params.squared_radii[j] <= params.stop_squared_radius || best.index < 0) {
            break;
        }
    }
    return result;
}

}  // namespace pyfeat
