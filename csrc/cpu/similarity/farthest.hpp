// SPDX-License-Identifier: Apache-2.0
// Epilogue of the similarity engine: k-centre greedy, the row farthest from all rows picked so far.
#pragma once

#include "cpu/isa.hpp"
#include "cpu/threads.hpp"
#include "params.hpp"

namespace pyfeat {

struct FarthestResult {
    std::int64_t num_done = 0;       // picks whose distances have been taken into account
    std::int64_t next_pick = -1;     // the farthest row after these, lowest index among equals
    std::int64_t num_distances = 0;  // of rows to picks; a full pass takes N
};

// One fused pass over the rows for each pick: distance, running minimum, arg-max. Distances are
// direct differences summed in float64, so the picks are those of a float64 reference. A picked
// row leaves the race: its squared distance is stored as -1.
//
// Rows near their own pick are passed over: if c is the new pick, o the owner of x and m = |x - o|,
// then |x - c| >= |c - o| - m, which is no less than m when |c - o| >= 2 m.
FarthestResult farthest_cpu(const FarthestParams& params, Isa isa, Execution& execution);

}  // namespace pyfeat
