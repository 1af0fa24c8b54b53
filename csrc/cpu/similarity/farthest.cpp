// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/farthest.hpp"

#include <algorithm>
#include <vector>

#include "check.hpp"
#include "cpu/similarity/kernels.hpp"

namespace pyfeat {

FarthestResult farthest_cpu(const FarthestParams& params, Isa isa, Execution& execution) {
    const Rows& rows = params.rows;
    const Kernels& kernels = kernels_for(isa);
    constexpr std::int64_t kRowsPerTask = 2048;
    const std::int64_t num_tasks = (rows.num_rows + kRowsPerTask - 1) / kRowsPerTask;
    std::vector<Farthest> farthest(static_cast<std::size_t>(num_tasks));
    std::vector<double> center(static_cast<std::size_t>(rows.dim));

    std::int64_t pick = params.picks[0];
    for (std::int64_t j = 0; j < params.num_picks; ++j) {
        PYFEAT_CHECK(pick >= 0 && pick < rows.num_rows, "a pick must be in [0, N), got ", pick);
        params.picks[j] = pick;
        params.squared_distances[pick] = -1.0;
        std::copy_n(rows.row(pick), rows.dim, center.begin());
        execution.parallel_for(num_tasks, [&](std::int64_t task, int) {
            const std::int64_t first = task * kRowsPerTask;
            const Rows block{rows.row(first),
                             std::min(kRowsPerTask, rows.num_rows - first),
                             rows.dim,
                             rows.stride};
            Farthest& found = farthest[static_cast<std::size_t>(task)];
            found = kernels.farthest_pass(block, center.data(), params.squared_distances + first);
            found.index += first;
        });
        Farthest best;
        for (const Farthest& found : farthest) {
            if (found.squared_distance > best.squared_distance) {
                best = found;
            }
        }
        params.squared_radii[j] = std::max(best.squared_distance, 0.0);
        pick = best.index;
        if (params.squared_radii[j] <= params.stop_squared_radius || pick < 0) {
            return {j + 1, pick};
        }
    }
    return {params.num_picks, pick};
}

}  // namespace pyfeat
