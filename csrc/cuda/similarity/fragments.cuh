// SPDX-License-Identifier: Apache-2.0
// What the epilogues of the losses share: rows and columns of a thread, and sums over the threads
// of a warp that hold the same ones.
//
// An epilogue takes the products of a warp four fragments at a time, a group: a thread has 2 M rows
// and kGroupColumns columns of those, however wide the warp's part is. Most groups are plain: their
// pairs all count and none is positive. Of these it need not ask pair by pair.
#pragma once

#include "cuda/device/power.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/similarity/engine.cuh"
#include "cuda/similarity/pairs.hpp"

namespace pyfeat::cuda {

constexpr int kGroupFragments = 4;
constexpr int kGroupColumns = 2 * kGroupFragments;  // of a thread
constexpr int kGroupWidth = 8 * kGroupFragments;    // of a warp

// Row r of a thread's 2 M, and column c of its eight in a group, within the warp's part.
__device__ inline int thread_row(int r, int lane) {
    return fragment_row(r / 2, r % 2 * 2, lane);
}
__device__ inline int thread_column(int c, int lane) {
    return fragment_column(c / 2, c % 2, lane);
}

template <int M, int N>
__device__ float product_at(const float (&products)[M][N][4], int r, int group, int c) {
    return products[r / 2][group * kGroupFragments + c / 2][r % 2 * 2 + c % 2];
}

// A column of a thread, read where it is used: it meets all rows of the thread at once.
struct PairColumn {
    ColumnSaid said;
    std::int32_t index;
};

// What epilogues know of the pairs of a thread.
template <int M>
class PairContext {
  public:
    __device__ explicit PairContext(const SimilarityParams& params)
        : params_(params),
          scale_(split_scale(*params.scale * params.unit)),
          offsets_(power_offsets(params.pairs)) {}

    __device__ void begin(std::int64_t row, int lane) {
        first_row_ = static_cast<std::int32_t>(row);
        lane_ = lane;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            rows_[r] = said_of_row(params_, this->row(r));
        }
        ids_ = span_of([&](int r) { return rows_[r].id; });
        groups_ = span_of([&](int r) { return rows_[r].group; });
        bool live = true;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            live = live && rows_[r].live;
        }
        // Where only positive pairs have power, no group is plain.
        may_be_plain_ = __all_sync(kWholeWarp, live) && !params_.pairs.only_positives;
    }
    __device__ std::int32_t row(int r) const {
        return first_row_ + thread_row(r, lane_);
    }
    __device__ bool is_live(int r) const {
        return rows_[r].live;
    }
    // Whether the group that begins at `first` is plain, the same for all lanes. Each looks at one
    // column; ids of rows are taken for all numbers between them, which batches in order are.
    __device__ bool is_plain(std::int64_t first) const {
        const ColumnSaid own = said_of_column(params_, static_cast<std::int32_t>(first) + lane_);
        const bool meets = ids_.holds(own.id) || groups_.holds(own.group);
        return may_be_plain_ && first + kGroupWidth <= params_.num_columns &&
               !__any_sync(kWholeWarp, meets);
    }
    // Column c of the thread in the group that begins at `first`.
    template <bool kPlain>
    __device__ PairColumn column(std::int64_t first, int c) const {
        const std::int32_t index = static_cast<std::int32_t>(first) + thread_column(c, lane_);
        if constexpr (kPlain) {
            return {{bias_of_column(params_, index), 0, 0}, index};
        }
        return {said_of_column(params_, index), index};
    }
    __device__ float similarity_of(float product, const PairColumn& column) const {
        return similarity(product, scale_, column.said.bias);
    }
    template <bool kPlain>
    __device__ PairKind kind(int r, const PairColumn& column) const {
        return kPlain ? PairKind{true, false} : kind_of(params_.pairs, rows_[r], column.said);
    }
    // Of what is in the log-sum-exps; -infinity elsewhere.
    template <bool kPlain>
    __device__ float exponent(float z, PairKind kind) const {
        return kPlain ? z : offsets_.exponent(z, kind);
    }

  private:
    // The least and the largest of the rows of a warp.
    struct Span {
        std::int32_t low, high;

        __device__ bool holds(std::int32_t value) const {
            return low <= value && value <= high;
        }
    };
    template <typename Of>
    __device__ static Span span_of(Of of) {
        Span span{of(0), of(0)};
#pragma unroll
        for (int r = 1; r < 2 * M; ++r) {
            span = {of(r) < span.low ? of(r) : span.low, of(r) > span.high ? of(r) : span.high};
        }
        return {__reduce_min_sync(kWholeWarp, span.low), __reduce_max_sync(kWholeWarp, span.high)};
    }

    const SimilarityParams& params_;
    SplitScale scale_;
    PowerOffsets offsets_;
    std::int32_t first_row_ = 0;
    int lane_ = 0;
    RowSaid rows_[2 * M];
    Span ids_{0, 0}, groups_{0, 0};
    bool may_be_plain_ = false;
};

// Over the four threads that have the same rows; all get the result, in the same bits.
template <typename Combine>
__device__ float over_row_threads(float value, Combine combine) {
    value = combine(value, __shfl_xor_sync(kWholeWarp, value, 1));
    return combine(value, __shfl_xor_sync(kWholeWarp, value, 2));
}

// Of the eight columns of a thread, that which column_total leaves with it.
__device__ inline int own_column(int lane) {
    return lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
}

// Over the eight threads that have the same columns. They share the work: each keeps half of the
// columns after every exchange, and ends up with own_column.
template <typename Combine>
__device__ float column_total(const float (&values)[kGroupColumns], int lane, Combine combine) {
    float rest[kGroupColumns];
#pragma unroll
    for (int c = 0; c < kGroupColumns; ++c) {
        rest[c] = values[c];
    }
#pragma unroll
    for (int half = kGroupColumns / 2; half > 0; half /= 2) {
        const int distance = 4 * half;
        const bool upper = (lane & distance) != 0;
#pragma unroll
        for (int c = 0; c < half; ++c) {
            const float kept = upper ? rest[c + half] : rest[c];
            const float sent = upper ? rest[c] : rest[c + half];
            rest[c] = combine(kept, __shfl_xor_sync(kWholeWarp, sent, distance));
        }
    }
    return rest[0];
}

// Gives every thread the values of all its columns back, each from the thread that owns it.
__device__ inline void spread_columns(float own, int lane, float (&values)[kGroupColumns]) {
    values[0] = own;
#pragma unroll
    for (int half = 1; half < kGroupColumns; half *= 2) {
        const int distance = 4 * half;
        const bool upper = (lane & distance) != 0;
#pragma unroll
        for (int c = 0; c < half; ++c) {
            const float other = __shfl_xor_sync(kWholeWarp, values[c], distance);
            values[c + half] = upper ? values[c] : other;
            values[c] = upper ? other : values[c];
        }
    }
}

struct Add {
    __device__ float operator()(float x, float y) const {
        return x + y;
    }
};
struct Larger {
    __device__ float operator()(float x, float y) const {
        return fmaxf(x, y);
    }
};

}  // namespace pyfeat::cuda
