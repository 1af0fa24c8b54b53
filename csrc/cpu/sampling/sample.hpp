// SPDX-License-Identifier: Apache-2.0
// Values at the points of queries, weighted and added up, with first and second derivatives.
// Compiled once per instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/sampling/points.hpp"
#include "cpu/sampling/rows.hpp"

namespace {

// Arrays over the corners of the points, corner by corner.
template <typename Real, int kDims, bool kDiscrete>
class Corners {
  public:
    using PointsOf = Points<Real, kDims, kDiscrete>;
    static constexpr int kCorners = PointsOf::kCorners;

    Corners(const PointsOf& points, Scratch& scratch)
        : points_(points), slots_(points.num_slots()), scratch_(scratch), factors_(take<Real>()) {}

    template <typename T>
    T* take() {
        return scratch_.take<T>(slots_ * kCorners);
    }
    CornerCounts counts() const {
        return {kCorners, points_.num_points(), slots_};
    }
    Real* factors() {
        return factors_;
    }
    void find_rows(const pyfeat::Cells<Real>& cells, Real** rows) const {
        for (int e = 0; e < kCorners; ++e) {
            const std::int32_t* numbers = points_.cells(e);
            Real** to = rows + e * slots_;
            for_slots(slots_, [=](std::int64_t t) { to[t] = cells.row(numbers[t]); });
        }
    }
    void find_rows(const pyfeat::Cells<const Real>& cells, const Real** rows) const {
        for (int e = 0; e < kCorners; ++e) {
            const std::int32_t* numbers = points_.cells(e);
            const Real** to = rows + e * slots_;
            for_slots(slots_, [=](std::int64_t t) { to[t] = cells.row(numbers[t]); });
        }
    }
    // factors[e, t] = of(e, t)
    template <typename Of>
    void fill_factors(Of of) {
        for (int e = 0; e < kCorners; ++e) {
            Real* to = factors_ + e * slots_;
            for_slots(slots_, [=](std::int64_t t) { to[t] = of(e, t); });
        }
    }

  private:
    const PointsOf& points_;
    std::int64_t slots_;
    Scratch& scratch_;
    Real* factors_;
};

// What a query reads lies far from what the one before it read, and is asked for ahead.
constexpr std::int64_t kQueriesAhead = 6;

// Inlined: compilers leave out the call of a function that computes nothing.
template <bool kSecondLevel = false, typename T>
PYFEAT_INLINE inline void ask_for(const T* data, std::int64_t count) {
    constexpr auto kLine = static_cast<std::int64_t>(64 / sizeof(T));
    for (std::int64_t i = 0; i < count; i += kLine) {
        if constexpr (kSecondLevel) {
            PYFEAT_PREFETCH_SECOND_LEVEL(data + i);
        } else {
            PYFEAT_PREFETCH(data + i);
        }
    }
}

// Places the points of query q.
template <typename Real, int kDims, bool kDiscrete>
inline void locate(const pyfeat::Samples<Real>& samples,
                   std::int64_t q,
                   Points<Real, kDims, kDiscrete>& points) {
    const auto locations = [&](std::int64_t i) {
        return samples.locations + i * samples.location_stride;
    };
    const auto weights = [&](std::int64_t i) {
        return samples.weights + i * samples.weight_stride;
    };
    if (q + kQueriesAhead < samples.num_queries) {
        ask_for(locations(q + kQueriesAhead), points.num_points() * kDims);
        ask_for(weights(q + kQueriesAhead), points.num_points());
    }
    points.locate(locations(q), weights(q));
}

// The points of one query, and its rows of values.
template <typename Real, int kDims, bool kDiscrete>
struct Placed {
    Points<Real, kDims, kDiscrete> points;
    Corners<Real, kDims, kDiscrete> corners;
    const Real** rows;
    Real** grad_rows;

    Placed(const pyfeat::PointTable<Real>& table, Scratch& scratch, bool has_grad_rows)
        : points(table, scratch),
          corners(points, scratch),
          rows(corners.template take<const Real*>()),
          grad_rows(has_grad_rows ? corners.template take<Real*>() : nullptr) {}
};

// Calls place(q, placed) and then use(q, placed) for every query, but places the next query first:
// what place asks for is on its way while the query before is used. A row is read in less time than
// it takes to arrive, and a processor looks only some rows ahead by itself.
template <typename Real, int kDims, bool kDiscrete, typename Place, typename Use>
inline void one_ahead(std::int64_t num_queries,
                      Placed<Real, kDims, kDiscrete>& even,
                      Placed<Real, kDims, kDiscrete>& odd,
                      Place place,
                      Use use) {
    if (num_queries > 0) {
        place(0, even);
    }
    for (std::int64_t q = 0; q < num_queries; ++q) {
        if (q + 1 < num_queries) {
            place(q + 1, q % 2 == 0 ? odd : even);
        }
        use(q, q % 2 == 0 ? even : odd);
    }
}

// Of the corners of points that lie far, if rows come from beyond the second-level cache: what is
// there costs half as much as the row. They are asked for in that cache, as the first has room for
// few requests at a time, which would be open for long.
template <typename Real>
PYFEAT_INLINE inline void ask_for_rows(const CornerCounts& counts,
                                       const pyfeat::PointTable<Real>& table,
                                       const Real* const* rows,
                                       std::int64_t dim) {
    if (table.num_distant == 0) {
        return;
    }
    constexpr auto kLine = static_cast<std::int64_t>(64 / sizeof(Real));
    const auto ask = [&](auto lines) PYFEAT_INLINE {
        for (int e = 0; e < counts.corners; ++e) {
            const Real* const* of_corner = rows + e * counts.slots;
            for (std::int64_t t = 0; t < table.num_far; ++t) {
                for (int i = 0; i < lines(); ++i) {
                    PYFEAT_PREFETCH_SECOND_LEVEL(of_corner[t] + i * kLine);
                }
            }
        }
    };
    if (dim == 2 * kLine) {
        ask(std::integral_constant<int, 2>{});
    } else if (dim <= kLine) {
        ask(std::integral_constant<int, 1>{});
    } else if (dim == 4 * kLine) {
        ask(std::integral_constant<int, 4>{});
    } else {
        for (int e = 0; e < counts.corners; ++e) {
            for (std::int64_t t = 0; t < table.num_far; ++t) {
                ask_for<true>(rows[e * counts.slots + t], dim);
            }
        }
    }
}

template <typename Real, int kDims, bool kDiscrete>
void gather(const pyfeat::PointTable<Real>& table,
            const pyfeat::Samples<Real>& samples,
            const pyfeat::Cells<const Real>& values,
            std::int64_t dim,
            const pyfeat::Features<Real>& output,
            double* memory) {
    using Query = Placed<Real, kDims, kDiscrete>;
    Scratch scratch(memory);
    Query even(table, scratch, false), odd(table, scratch, false);
    const auto place = [&](std::int64_t q, Query& query) {
        locate(samples, q, query.points);
        query.corners.find_rows(values, query.rows);
        ask_for_rows(query.corners.counts(), table, query.rows, dim);
        query.corners.fill_factors(
            [&](int e, std::int64_t t) { return query.points.weight(e, t); });
    };
    one_ahead(samples.num_queries, even, odd, place, [&](std::int64_t q, Query& query) {
        Corners<Real, kDims, kDiscrete>& corners = query.corners;
        add_rows(corners.counts(), corners.factors(), query.rows, dim, false, output.row(q));
    });
}

// use(axis) for every axis, a constant.
template <int kDims, int kFirst = 0, typename Use>
inline void for_axes(Use use) {
    if constexpr (kFirst < kDims) {
        use(std::integral_constant<int, kFirst>{});
        for_axes<kDims, kFirst + 1>(use);
    }
}

// Sums over the corners of dots times their shares in the value, or in its derivatives.
template <typename Real, int kDims, bool kDiscrete, typename... Axes>
inline Real at_point(const Points<Real, kDims, kDiscrete>& points,
                     const Real* dots,
                     std::int64_t t,
                     Axes... axes) {
    Real sum{0};
    PYFEAT_UNROLL
    for (int e = 0; e < Points<Real, kDims, kDiscrete>::kCorners; ++e) {
        sum += points.share(e, t, axes...) * dots[e * points.num_slots() + t];
    }
    return sum;
}

// With A the weights, f the values at the points and G the upstream gradient, dA = <G, f> and
// du = A <G, df/du>; of logits z dz = A (dA - <A, dA>).
template <typename Real, int kDims, bool kDiscrete>
void write_gradients(const Points<Real, kDims, kDiscrete>& points,
                     const pyfeat::PointTable<Real>& table,
                     const Real* dots,
                     const pyfeat::SampleGradients<Real>& gradients,
                     std::int64_t q,
                     Real* by_point) {
    const Real* weights = points.weights();
    const std::int64_t num_points = table.num_points;
    if (gradients.weights.data != nullptr) {
        for_slots(table.num_slots,
                  [&](std::int64_t t) { by_point[t] = at_point(points, dots, t); });
        Real mean{0};
        for (std::int64_t t = 0; t < num_points && table.softmax; ++t) {
            mean += weights[t] * by_point[t];
        }
        Real* to = gradients.weights.row(q);
        for (std::int64_t t = 0; t < num_points; ++t) {
            to[t] = table.softmax ? weights[t] * (by_point[t] - mean) : by_point[t];
        }
    }
    if constexpr (!kDiscrete) {
        if (gradients.locations.data != nullptr) {
            for_axes<kDims>([&](auto axis) {
                const Real* factors = table.factors[axis];
                Real* to = by_point + axis * table.num_slots;
                for_slots(table.num_slots, [&](std::int64_t t) {
                    const Real by_u = weights[t] * at_point(points, dots, t, axis);
                    const Real gradient = factors[t] * by_u;
                    to[t] = points.is_there(t) ? gradient : Real{0};
                });
            });
            Real* to = gradients.locations.row(q);
            PYFEAT_INDEPENDENT
            for (std::int64_t t = 0; t < num_points; ++t) {
                for (int j = 0; j < kDims; ++j) {
                    to[t * kDims + j] = by_point[j * table.num_slots + t];
                }
            }
        }
    }
}

template <typename Real, int kDims, bool kDiscrete>
void gradients(const pyfeat::PointTable<Real>& table,
               const pyfeat::Samples<Real>& samples,
               const pyfeat::Cells<const Real>& values,
               std::int64_t dim,
               const pyfeat::Features<const Real>& upstream,
               const pyfeat::SampleGradients<Real>& gradients,
               double* memory) {
    using Query = Placed<Real, kDims, kDiscrete>;
    Scratch scratch(memory);
    Query even(table, scratch, true), odd(table, scratch, true);
    Real* dots = even.corners.template take<Real>();
    Real* by_point = scratch.take<Real>(table.num_slots * kDims);
    const bool by_points = gradients.weights.data != nullptr || gradients.locations.data != nullptr;
    const bool by_values = gradients.value.data != nullptr;
    const auto place = [&](std::int64_t q, Query& query) {
        locate(samples, q, query.points);
        if (q + kQueriesAhead < samples.num_queries) {
            ask_for(upstream.row(q + kQueriesAhead), dim);
        }
        if (by_points) {
            query.corners.find_rows(values, query.rows);
            ask_for_rows(query.corners.counts(), table, query.rows, dim);
        }
        if (by_values) {
            query.corners.find_rows(gradients.value, query.grad_rows);
            ask_for_rows(query.corners.counts(), table, query.grad_rows, dim);
        }
    };
    one_ahead(samples.num_queries, even, odd, place, [&](std::int64_t q, Query& query) {
        Corners<Real, kDims, kDiscrete>& corners = query.corners;
        if (by_points) {
            dot_rows(corners.counts(), query.rows, upstream.row(q), dim, dots);
            write_gradients(query.points, table, dots, gradients, q, by_point);
        }
        if (by_values) {
            corners.fill_factors([&](int e, std::int64_t t) { return query.points.weight(e, t); });
            add_to_rows(corners.counts(),
                        corners.factors(),
                        query.grad_rows,
                        upstream.row(q),
                        gradients.first_feature,
                        gradients.first_feature + gradients.num_features);
        }
    });
}

// Of Phi = <gV, dV> + <gA, dA> + <gp, dp>, with g the cotangents of the first gradients, f~ the
// value of gV at a point and h_j = factor_j gp_j:
//   dPhi/dG = sum A f~ + gA f + A sum_j h_j df/du_j
//   dPhi/dA = <G, f~ + sum_j h_j df/du_j>
//   dPhi/dV adds G (gA share + A sum_j h_j dshare/du_j) to the corners
//   dPhi/du_i = <G, A df~/du_i + gA df/du_i + A sum_{j != i} h_j d2f/du_i du_j>
template <typename Real, int kDims, bool kDiscrete>
void second_gradients(const pyfeat::PointTable<Real>& table,
                      const pyfeat::Samples<Real>& samples,
                      const pyfeat::Cells<const Real>& values,
                      std::int64_t dim,
                      const pyfeat::Features<const Real>& upstream,
                      const pyfeat::SecondOrder<Real>& second,
                      const pyfeat::SampleGradients<Real>& gradients,
                      double* memory) {
    constexpr int kSlopes = kDiscrete ? 0 : kDims;
    Scratch scratch(memory);
    Points<Real, kDims, kDiscrete> points(table, scratch);
    Corners<Real, kDims, kDiscrete> corners(points, scratch);
    const Real** rows = corners.template take<const Real*>();
    const Real** by_rows = corners.template take<const Real*>();
    Real** grad_rows = corners.template take<Real*>();
    Real* dots = corners.template take<Real>();
    Real* by_dots = corners.template take<Real>();
    const CornerCounts counts = corners.counts();
    const Real* weights = points.weights();
    for (std::int64_t q = 0; q < samples.num_queries; ++q) {
        const Real *by_weights = second.by_weights.row(q),
                   *by_locations = second.by_locations.row(q);
        const auto by_u = [&](int j, std::int64_t t) {
            return table.factors[j][t] * by_locations[t * kDims + j];
        };
        locate(samples, q, points);
        corners.find_rows(values, rows);
        corners.find_rows(second.by_value, by_rows);
        corners.find_rows(gradients.value, grad_rows);
        dot_rows(counts, rows, upstream.row(q), dim, dots);
        dot_rows(counts, by_rows, upstream.row(q), dim, by_dots);
        Real* grad_weights = gradients.weights.row(q);
        Real* grad_locations = gradients.locations.row(q);
        for (std::int64_t t = 0; t < table.num_points; ++t) {
            const bool there = points.is_there(t);
            Real by_weight = at_point(points, by_dots, t);
            for (int j = 0; j < kSlopes; ++j) {
                by_weight += by_u(j, t) * at_point(points, dots, t, j);
            }
            grad_weights[t] = there ? by_weight : Real{0};
            for (int i = 0; i < kSlopes; ++i) {
                Real slope = at_point(points, by_dots, t, i);
                for (int j = 0; j < kDims; ++j) {
                    if (j != i) {
                        slope += by_u(j, t) * at_point(points, dots, t, i, j);
                    }
                }
                slope = weights[t] * slope + by_weights[t] * at_point(points, dots, t, i);
                grad_locations[t * kDims + i] = there ? table.factors[i][t] * slope : Real{0};
            }
        }
        Real* output = second.output.row(q);
        corners.fill_factors([&](int e, std::int64_t t) { return points.weight(e, t); });
        add_rows(counts, corners.factors(), by_rows, dim, false, output);
        for (int e = 0; e < corners.kCorners; ++e) {
            for (std::int64_t t = 0; t < table.num_points; ++t) {
                Real slope{0};
                for (int j = 0; j < kSlopes; ++j) {
                    slope += by_u(j, t) * points.share(e, t, j);
                }
                corners.factors()[e * table.num_slots + t] =
                    points.cells(e)[t] < 0
                        ? Real{0}
                        : by_weights[t] * points.share(e, t) + weights[t] * slope;
            }
        }
        add_rows(counts, corners.factors(), rows, dim, true, output);
        add_to_rows(counts, corners.factors(), grad_rows, upstream.row(q), 0, dim);
    }
}

}  // namespace
