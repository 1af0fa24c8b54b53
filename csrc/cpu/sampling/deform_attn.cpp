// SPDX-License-Identifier: Apache-2.0
#include "cpu/sampling/deform_attn.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/blocks.hpp"
#include "cpu/sampling/head_values.hpp"
#include "cpu/sampling/kernels.hpp"
#include "cpu/sampling/points_table.hpp"

namespace pyfeat {
namespace {

constexpr std::int64_t kQueriesPerTask = 128;  // at most

template <typename Real>
class DeformAttn {
  public:
    DeformAttn(const DeformAttnParams& params, Isa isa, Execution& execution)
        : params_(params),
          kernels_(sampling_kernels_for(isa).of<Real>()),
          execution_(execution),
          table_(params),
          values_(params, kernels_, table_.points()),
          num_pairs_(params.batch * params.heads),
          queries_per_task_(
              even_chunk(std::max<std::int64_t>(params.num_queries, 1), kQueriesPerTask, 1)),
          workers_(static_cast<std::size_t>(execution.num_threads())) {
        table_.space_rows(values_.row_bytes());
    }

    void forward(Real* output) {
        for_query_ranges(
            [&](std::int64_t pair, Range queries, const Values& values, Worker& worker) {
                kernels_.gather(table_.points(),
                                samples(pair, queries),
                                values,
                                params_.dim,
                                features(output, pair, queries.first),
                                worker.scratch);
            });
    }

    // The gradient by the values of a pair is made by one task, or with fewer pairs than threads
    // by one for each slice of the features: in the order of the queries in any case.
    void backward(const DeformAttnGradients& given) {
        const bool sliced = num_pairs_ < execution_.num_threads() && values_.width() > kPointBlock;
        if (given.value == nullptr || sliced) {
            for_query_ranges(
                [&](std::int64_t pair, Range queries, const Values& values, Worker& worker) {
                    const auto to = point_gradients(given, pair, queries.first);
                    add_gradients(given, pair, values, queries, to, worker);
                });
        }
        if (given.value == nullptr) {
            return;
        }
        prefer_huge_pages(
            given.value,
            params_.batch * params_.num_cells * params_.heads * params_.dim * kRealBytes);
        const bool in_place = sliced || !values_.packs();
        if (in_place) {
            fill_with_zeros(static_cast<Real*>(given.value));
        }
        if (!sliced) {
            for_pairs([&](std::int64_t pair, const Values& values, Worker& worker) {
                add_value_gradient(given, pair, values, {0, params_.dim}, in_place, worker);
            });
            return;
        }
        const std::int64_t num_slices = values_.width() / kPointBlock;
        for_tasks(num_pairs_ * num_slices, [&](std::int64_t i, Worker& worker) {
            const std::int64_t first = i % num_slices * kPointBlock;
            const Range part{first, std::min(params_.dim, first + kPointBlock)};
            // Values are not read for these.
            add_value_gradient(given, i / num_slices, {}, part, in_place, worker);
        });
    }

    void second(const DeformAttnSecond& second, const DeformAttnGradients& given) {
        fill_with_zeros(static_cast<Real*>(given.value));
        for_pairs([&](std::int64_t pair, const Values& values, Worker& worker) {
            for_queries([&](Range queries) {
                const std::int64_t q = queries.first;
                SampleGradients<Real> to = point_gradients(given, pair, q);
                to.value = value_gradient(given, pair, worker);
                kernels_.second(
                    table_.points(),
                    samples(pair, queries),
                    values,
                    params_.dim,
                    features(static_cast<const Real*>(given.upstream), pair, q),
                    {cells_of(static_cast<const Real*>(second.by_value), pair),
                     of_points(static_cast<const Real*>(second.by_locations), pair, q, n()),
                     of_points(static_cast<const Real*>(second.by_weights), pair, q, 1),
                     features(static_cast<Real*>(second.output), pair, q)},
                    to,
                    worker.scratch);
            });
        });
    }

  private:
    using Values = Cells<const Real>;

    struct Worker {
        AlignedArray<double> scratch_memory;
        AlignedArray<Real> outside, rows, values;
        double* scratch = nullptr;
    };
    static constexpr auto kRealBytes = static_cast<std::int64_t>(sizeof(Real));

    std::int64_t n() const {
        return params_.num_dims;
    }

    // body(task, worker)
    template <typename Body>
    void for_tasks(std::int64_t count, Body body) {
        execution_.parallel_for(count, [&](std::int64_t task, int index) {
            Worker& worker = workers_[static_cast<std::size_t>(index)];
            if (worker.scratch == nullptr) {
                worker.scratch = worker.scratch_memory.make_zeros(scratch_size(table_.points()));
                worker.outside.make_zeros(values_.width());
            }
            body(task, worker);
        });
    }

    // An array [B, S, H, D].
    void fill_with_zeros(Real* data) {
        constexpr std::int64_t kPerTask = 1 << 18;
        const std::int64_t size = params_.batch * params_.num_cells * params_.heads * params_.dim;
        execution_.parallel_for(num_chunks(size, kPerTask), [&](std::int64_t task, int) {
            const std::int64_t first = task * kPerTask;
            std::fill_n(data + first, std::min(kPerTask, size - first), Real{0});
        });
    }

    // body(range of queries), until somebody asks for a stop.
    template <typename Body>
    void for_queries(Body body) {
        for (std::int64_t q = 0; q < params_.num_queries; q += queries_per_task_) {
            if (execution_.stop_requested()) {
                return;
            }
            body(Range{q, std::min(params_.num_queries, q + queries_per_task_)});
        }
    }

    // body(pair, values, worker), each pair a task that packs its values: what it reads often is
    // in the caches of its own core then.
    template <typename Body>
    void for_pairs(Body body) {
        for_tasks(params_.dim == 0 ? 0 : num_pairs_, [&](std::int64_t pair, Worker& worker) {
            body(pair, values_.packed_for(pair, worker.values), worker);
        });
    }

    // body(pair, range of queries, values, worker), until somebody asks for a stop. Pairs that
    // threads cannot share out are packed by all of them, as many as fit at a time.
    template <typename Body>
    void for_query_ranges(Body body) {
        const std::int64_t threads = execution_.num_threads();
        if (values_.packs() && 7 * num_chunks(num_pairs_, threads) * threads <= 8 * num_pairs_) {
            for_pairs([&](std::int64_t pair, const Values& values, Worker& worker) {
                for_queries([&](Range queries) { body(pair, queries, values, worker); });
            });
            return;
        }
        const std::int64_t group = values_.group(num_pairs_, execution_.num_threads());
        const std::int64_t chunks = num_chunks(params_.num_queries, queries_per_task_);
        for (std::int64_t first = 0; first < num_pairs_ && params_.dim > 0; first += group) {
            const Range pairs{first, std::min(num_pairs_, first + group)};
            values_.pack(pairs, execution_);
            for_tasks((pairs.end - pairs.first) * chunks, [&](std::int64_t task, Worker& worker) {
                const std::int64_t pair = pairs.first + task / chunks;
                const std::int64_t q = task % chunks * queries_per_task_;
                const Range queries{q, std::min(params_.num_queries, q + queries_per_task_)};
                if (!execution_.stop_requested()) {
                    body(pair, queries, values_.cells(pair, pairs), worker);
                }
            });
        }
    }

    Samples<Real> samples(std::int64_t pair, Range queries) const {
        const auto at = [&](const void* data, const std::int64_t* strides) {
            return static_cast<const Real*>(data) + pair / params_.heads * strides[0] +
                   queries.first * strides[1] + pair % params_.heads * strides[2];
        };
        return {queries.end - queries.first,
                at(params_.locations, params_.location_strides),
                params_.location_strides[1],
                at(params_.weights, params_.weight_strides),
                params_.weight_strides[1]};
    }

    // Of an array [B, Q, H, size].
    template <typename T>
    Features<T> by_query(T* data, std::int64_t pair, std::int64_t query, std::int64_t size) const {
        const std::int64_t stride = params_.heads * size;
        const std::int64_t row = pair / params_.heads * params_.num_queries + query;
        return {data + row * stride + pair % params_.heads * size, stride};
    }
    template <typename T>
    Features<T> features(T* data, std::int64_t pair, std::int64_t query) const {
        return by_query(data, pair, query, params_.dim);
    }
    template <typename T>
    Features<T> of_points(T* data, std::int64_t pair, std::int64_t query, std::int64_t each) const {
        return data == nullptr ? Features<T>{nullptr, 0}
                               : by_query(data, pair, query, table_.points().num_points * each);
    }

    // Of an array [B, S, H, D].
    template <typename T>
    Cells<T> cells_of(T* data, std::int64_t pair) {
        const std::int64_t stride = params_.heads * params_.dim;
        return {data + pair / params_.heads * params_.num_cells * stride +
                    pair % params_.heads * params_.dim,
                stride,
                values_.outside()};
    }
    Cells<Real> value_gradient(const DeformAttnGradients& given,
                               std::int64_t pair,
                               Worker& worker) {
        Cells<Real> cells = cells_of(static_cast<Real*>(given.value), pair);
        cells.outside = worker.outside.data();
        return cells;
    }
    SampleGradients<Real> point_gradients(const DeformAttnGradients& given,
                                          std::int64_t pair,
                                          std::int64_t query) const {
        return {{},
                0,
                0,
                of_points(static_cast<Real*>(given.locations), pair, query, n()),
                of_points(static_cast<Real*>(given.weights), pair, query, 1)};
    }

    void add_gradients(const DeformAttnGradients& given,
                       std::int64_t pair,
                       const Values& values,
                       Range queries,
                       const SampleGradients<Real>& to,
                       Worker& worker) {
        kernels_.gradients(table_.points(),
                           samples(pair, queries),
                           values,
                           params_.dim,
                           features(static_cast<const Real*>(given.upstream), pair, queries.first),
                           to,
                           worker.scratch);
    }

    // By the values of a pair, of some features; by locations and weights too if these are all.
    void add_value_gradient(const DeformAttnGradients& given,
                            std::int64_t pair,
                            const Values& values,
                            Range part,
                            bool in_place,
                            Worker& worker) {
        const bool whole = part.first == 0 && part.end == params_.dim;
        Cells<Real> cells = value_gradient(given, pair, worker);
        if (!in_place) {
            cells.data = worker.rows.make_zeros(params_.num_cells * values_.width());
            cells.stride = values_.width();
        }
        for_queries([&](Range queries) {
            SampleGradients<Real> to{};
            if (whole) {
                to = point_gradients(given, pair, queries.first);
            }
            to.value = cells;
            to.first_feature = part.first;
            to.num_features = part.end - part.first;
            add_gradients(given, pair, values, queries, to, worker);
        });
        if (!in_place) {
            const Cells<Real> to = value_gradient(given, pair, worker);
            kernels_.store(
                cells.data, cells.stride, params_.num_cells, params_.dim, to.data, to.stride);
            std::atomic_thread_fence(std::memory_order_seq_cst);
        }
    }

    const DeformAttnParams& params_;
    const SamplingKernels<Real>& kernels_;
    Execution& execution_;
    FilledPointTable<Real> table_;
    HeadValues<Real> values_;
    std::int64_t num_pairs_;
    std::int64_t queries_per_task_;
    std::vector<Worker> workers_;
};

// By dtype of the values.
template <typename Use>
void for_real(Dtype dtype, Use use) {
    if (dtype == Dtype::kFloat64) {
        use(double{});
    } else {
        use(float{});
    }
}

}  // namespace

void deform_attn_cpu(const DeformAttnParams& params, void* output, Isa isa, Execution& execution) {
    for_real(params.dtype, [&](auto real) {
        using Real = decltype(real);
        DeformAttn<Real>(params, isa, execution).forward(static_cast<Real*>(output));
    });
}

void deform_attn_backward_cpu(const DeformAttnParams& params,
                              const DeformAttnGradients& gradients,
                              Isa isa,
                              Execution& execution) {
    for_real(params.dtype, [&](auto real) {
        DeformAttn<decltype(real)>(params, isa, execution).backward(gradients);
    });
}

void deform_attn_second_cpu(const DeformAttnParams& params,
                            const DeformAttnSecond& second,
                            const DeformAttnGradients& gradients,
                            Isa isa,
                            Execution& execution) {
    for_real(params.dtype, [&](auto real) {
        DeformAttn<decltype(real)>(params, isa, execution).second(second, gradients);
    });
}

}  // namespace pyfeat
