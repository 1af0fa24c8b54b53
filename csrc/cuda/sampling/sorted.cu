// SPDX-License-Identifier: Apache-2.0
// The gradient of deformable attention by values, in an order that is the same in every run.
//
// Every corner of a point is a term of a cell: the row whose gradient it adds, and its factor.
// Terms are counted by cell, put where those of their cell lie, and each cell gathers its own: a
// warp sorts them by their number in shared memory, and adds them up.
#include "check.hpp"
#include "cuda/device/shared.cuh"
#include "cuda/sampling/channels.cuh"
#include "cuda/sampling/deform_attn.hpp"
#include "cuda/sampling/dispatch.cuh"
#include "cuda/sampling/rows.cuh"

namespace pyfeat::cuda {
namespace {

// Threads that share the points of a row.
constexpr int kTeam = 8;
constexpr int kWarps = kMaxThreads / kWarpSize;
// Terms that a warp sorts at a time.
constexpr int kWindow = 256;
constexpr std::uint32_t kNoTerm = 0xFFFFFFFF;

template <typename Real>
struct alignas(2 * sizeof(Real)) Term {
    std::uint32_t number;  // of the row in its part, the point, and the corner
    Real factor;
};

// A part of the queries, as kernels take it.
struct Terms {
    std::int64_t first_row, num_rows;  // of [B, Q, H]
    std::int64_t first_batch, num_slots;
    std::uint32_t terms_per_row;  // T corners
};

// use(slot, number, factor) for every term of the rows of a block.
template <bool kWeighs, typename Real, int kDims, typename Use>
__device__ inline void for_terms(const Sampling& sampling, const Terms& terms, Use use) {
    const std::int64_t in_part =
        std::int64_t{blockIdx.x} * (kMaxThreads / kTeam) + threadIdx.x / kTeam;
    const std::int64_t index = terms.first_row + (in_part < terms.num_rows ? in_part : 0);
    Row row;
    row.head = index % sampling.num_heads;
    row.query = index / sampling.num_heads % sampling.num_queries;
    row.batch = index / sampling.num_heads / sampling.num_queries;
    row.live = in_part < terms.num_rows;
    row.lane = static_cast<int>(threadIdx.x) % kTeam;
    const Points<Real, kDims> points(sampling, row, kTeam, kWeighs);
    std::int64_t first_slot =
        ((row.batch - terms.first_batch) * sampling.num_heads + row.head) * sampling.num_cells;
    for (int l = 0, first_point = 0; l < sampling.levels.count; ++l) {
        const Level& level = sampling.levels.items[l];
        for (int own = row.lane; own < level.num_points; own += kTeam) {
            const int t = first_point + own;
            const Spot<Real, kDims> spot = points.spot(t, true, level, sampling.modes);
            const bool there = spot.corners != 0;
            const Real weight = kWeighs && there ? points.weight(t) : Real{0};
#pragma unroll
            for (int e = 0; e < 1 << kDims; ++e) {
                if (has_corner(spot.corners, e)) {
                    const auto number = static_cast<std::uint32_t>(in_part) * terms.terms_per_row +
                                        (static_cast<std::uint32_t>(t) << kDims) +
                                        static_cast<std::uint32_t>(e);
                    use(first_slot + spot.cell + corner_offset<kDims>(level, e),
                        number,
                        weight * corner_share<kDims>(spot.above, e));
                }
            }
        }
        first_point += level.num_points;
        first_slot += level.num_cells();
    }
}

template <typename Real, int kDims>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    count_terms_kernel(const __grid_constant__ Sampling sampling,
                       const __grid_constant__ Terms terms,
                       std::int32_t* counts) {  // [slots]
    for_terms<false, Real, kDims>(
        sampling, terms, [&](std::int64_t slot, std::uint32_t /*number*/, Real /*factor*/) {
            atomicAdd(counts + slot, 1);
        });
}

// Leaves in ends where the terms of every slot begin.
template <typename Real, int kDims>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    place_terms_kernel(const __grid_constant__ Sampling sampling,
                       const __grid_constant__ Terms terms,
                       std::int32_t* ends,    // [slots + 1]
                       Term<Real>* placed) {  // [terms]
    for_terms<true, Real, kDims>(
        sampling, terms, [&](std::int64_t slot, std::uint32_t number, Real factor) {
            placed[atomicAdd(ends + slot, -1) - 1] = {number, factor};
        });
}

// Terms numbered from low to high - 1, in any order, as far as there is room; returns how many.
template <typename Real>
__device__ inline int collect_terms(const Term<Real>* terms,
                                    int num_terms,
                                    std::uint32_t low,
                                    std::uint32_t high,
                                    Term<Real>* window) {  // [kWindow]
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    int found = 0;
    for (int first = 0; first < num_terms; first += kWarpSize) {
        Term<Real> term{kNoTerm, Real{0}};
        if (first + lane < num_terms) {
            term = terms[first + lane];
        }
        const bool taken = term.number >= low && term.number < high;
        const std::uint32_t takers = __ballot_sync(kWholeWarp, taken);
        const int at = found + __popc(takers & ((1U << lane) - 1));
        if (taken && at < kWindow) {
            window[at] = term;
        }
        found += __popc(takers);
    }
    return found;
}

// By number, in a network of comparisons that is the same for all of one length, a power of two.
template <typename Real>
__device__ inline void sort_terms(Term<Real>* window, int length) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int run = 2; run <= length; run *= 2) {
        for (int apart = run / 2; apart > 0; apart /= 2) {
            __syncwarp();
            for (int i = lane; i < length / 2; i += kWarpSize) {
                const int a = 2 * i - (i & (apart - 1)), b = a + apart;
                const bool rises = (a & run) == 0;
                const Term<Real> lower = window[a], upper = window[b];
                if ((lower.number > upper.number) == rises) {
                    window[a] = upper;
                    window[b] = lower;
                }
            }
        }
    }
    __syncwarp();
}

// use(count) for windows of sorted terms that follow each other.
template <typename Real, typename Use>
__device__ inline void for_windows(const Term<Real>* terms,
                                   int num_terms,
                                   std::uint32_t end,  // of numbers
                                   Term<Real>* window,
                                   Use use) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    std::uint32_t low = 0;
    // If numbers are spread evenly, a window is half full.
    std::uint32_t span = end;
    if (num_terms > kWindow) {
        span = end / static_cast<std::uint32_t>(num_terms) * (kWindow / 2) + 1;
    }
    while (low < end) {
        const std::uint32_t high = end - low > span ? low + span : end;
        const int found = collect_terms(terms, num_terms, low, high, window);
        if (found > kWindow) {
            span = span / 2 + span % 2;  // at least 1, which leaves one term
            __syncwarp();
            continue;
        }
        int length = 2;
        while (length < found) {
            length *= 2;
        }
        for (int i = found + lane; i < length; i += kWarpSize) {
            window[i] = {kNoTerm, Real{0}};
        }
        sort_terms(window, length);
        use(found);
        __syncwarp();
        low = high;
        span = found < kWindow / 4 && span < end / 2 ? span * 2 : span;
    }
}

// One warp for each slot, whose teams take turns at the terms.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    gather_terms_kernel(const __grid_constant__ Sampling sampling,
                        const __grid_constant__ Terms terms,
                        int team,
                        const std::int32_t* begins,  // [slots + 1]
                        const Term<RealOf<T>>* placed,
                        const T* upstream,      // [B, Q, H, D]
                        RealOf<T>* by_value) {  // [B, S, H, D]
    using Real = RealOf<T>;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    Term<Real>* window = reinterpret_cast<Term<Real>*>(dynamic_shared()) + warp * kWindow;
    const std::int64_t slot = std::int64_t{blockIdx.x} * kWarps + warp;
    if (slot >= terms.num_slots) {
        return;
    }
    const std::int32_t begin = begins[slot], count = begins[slot + 1] - begin;
    if (count == 0) {
        return;
    }
    const std::int64_t slice = slot / sampling.num_cells, cell = slot % sampling.num_cells;
    const std::int64_t batch = terms.first_batch + slice / sampling.num_heads;
    const std::int64_t head = slice % sampling.num_heads;
    Real* to =
        by_value + ((batch * sampling.num_cells + cell) * sampling.num_heads + head) * sampling.dim;
    const T* grads = upstream + terms.first_row * sampling.dim;
    const auto end = static_cast<std::uint32_t>(terms.num_rows) * terms.terms_per_row;
    for (int first = 0; first < sampling.dim; first += team * kWidth) {
        const int channel = first + lane % team * kWidth;
        const bool reads = channel < sampling.dim;
        Real sums[kWidth]{};
        for_windows(placed + begin, count, end, window, [&](int found) {
            for (int i = lane / team; reads && i < found; i += kWarpSize / team) {
                const std::int64_t row = window[i].number / terms.terms_per_row;
                const auto grad = Channels<T, kWidth>::load(grads + row * sampling.dim + channel);
#pragma unroll
                for (int c = 0; c < kWidth; ++c) {
                    sums[c] = std::fma(window[i].factor, Real{grad[c]}, sums[c]);
                }
            }
        });
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
            for (int apart = team; apart < kWarpSize; apart *= 2) {
                sums[c] += __shfl_xor_sync(kWholeWarp, sums[c], apart);
            }
        }
        if (lane < team && reads) {
#pragma unroll
            for (int c = 0; c < kWidth; ++c) {
                to[channel + c] += sums[c];
            }
        }
    }
}

Terms to_terms(const DeformAttnParams& params, const TermsPart& part) {
    std::int64_t num_points = 0;
    for (const std::int64_t count : params.num_points) {
        num_points += count;
    }
    Terms terms;
    terms.first_row = part.first * params.heads;
    terms.num_rows = (part.last - part.first) * params.heads;
    terms.first_batch = part.first / params.num_queries;
    const std::int64_t last_batch = (part.last - 1) / params.num_queries;
    terms.num_slots = (last_batch + 1 - terms.first_batch) * params.heads * params.num_cells;
    PYFEAT_CHECK(terms.num_rows * num_points << params.num_dims < INT32_MAX,
                 "deform_attn: corners of points of a part must be fewer than 2^31, got ",
                 terms.num_rows * num_points << params.num_dims);
    terms.terms_per_row = static_cast<std::uint32_t>(num_points << params.num_dims);
    return terms;
}

// use(Real{}, n), the latter a constant.
template <typename Use>
void for_places(const DeformAttnParams& params, Use use) {
    for_dims(params, [&](auto dims) {
        if (params.dtype == Dtype::kFloat64) {
            use(double{}, dims);
        } else {
            use(float{}, dims);
        }
    });
}

Launch launch_of_rows(const Terms& terms) {
    constexpr int kRows = kMaxThreads / kTeam;
    return {dim3(static_cast<unsigned>((terms.num_rows + kRows - 1) / kRows)), dim3(kMaxThreads)};
}

}  // namespace

void count_terms(const DeformAttnParams& params,
                 const TermsPart& part,
                 std::int32_t* counts,
                 const Site& site) {
    const Terms terms = to_terms(params, part);
    for_places(params, [&](auto real, auto dims) {
        launch(site,
               launch_of_rows(terms),
               count_terms_kernel<decltype(real), decltype(dims)::value>,
               to_sampling(params),
               terms,
               counts);
    });
}

void gather_terms(const DeformAttnParams& params,
                  const TermsPart& part,
                  std::int32_t* ends,
                  void* placed,
                  const DeformAttnGradients& gradients,
                  const Site& site) {
    const Terms terms = to_terms(params, part);
    const Sampling sampling = to_sampling(params);
    for_places(params, [&](auto real, auto dims) {
        using Real = decltype(real);
        launch(site,
               launch_of_rows(terms),
               place_terms_kernel<Real, decltype(dims)::value>,
               sampling,
               terms,
               ends,
               static_cast<Term<Real>*>(placed));
    });
    for_element(params, gradients.upstream, [&](auto element, auto width) {
        using T = decltype(element);
        using Real = RealOf<T>;
        launch(site,
               {dim3(static_cast<unsigned>((terms.num_slots + kWarps - 1) / kWarps)),
                dim3(kMaxThreads),
                sizeof(Term<Real>) * kWindow * kWarps},
               gather_terms_kernel<T, decltype(width)::value>,
               sampling,
               terms,
               team_of(params, width),
               ends,
               static_cast<const Term<Real>*>(placed),
               static_cast<const T*>(gradients.upstream),
               static_cast<Real*>(gradients.value));
    });
}

}  // namespace pyfeat::cuda
