// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/farthest.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "check.hpp"
#include "cpu/similarity/limits.hpp"
#include "cpu/similarity/nearer.hpp"
#include "cpu/similarity/search.hpp"
#include "cpu/similarity/sweep.hpp"

namespace pyfeat {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Candidate kBeforeAll{kInfinity, -1};
constexpr Candidate kBehindAll{-0.5, 0};  // only picks are behind it

// How many active rows are wanted: at first, at least and at most (their copy is a few percent of
// the features), and how many times fewer will do when the level is lowered.
constexpr std::int64_t kFirstActive = 1024, kLeastActive = 256, kFewer = 64;
std::int64_t most_active(std::int64_t num_rows) {
    return std::max<std::int64_t>(num_rows / 32, 4096);
}

// Work is counted in float64 distances. To pack a row or a pick costs about eight of them, and a
// 64th either a product in a tile or a look at what a row knows.
constexpr std::int64_t kPacking = 8, kLooks = 64;

constexpr double kBoundScale = 1.0;  // the bounds as they are

// Rows or picks that are held side by side: at most 32 MB in float64.
std::int64_t most_gathered(std::int64_t dim) {
    return std::clamp<std::int64_t>((4LL << 20) / std::max<std::int64_t>(dim, 1), 1, 8192);
}

std::size_t to_size(std::int64_t value) {
    return static_cast<std::size_t>(value);
}

template <typename T>
std::int64_t size_of(const std::vector<T>& values) {
    return static_cast<std::int64_t>(values.size());
}

// Calls body(first, end) for ranges of [0, count), on several threads.
template <typename Body>
void for_ranges(std::int64_t count, std::int64_t range, Execution& execution, Body body) {
    execution.parallel_for((count + range - 1) / range, [&](std::int64_t task, int) {
        body(task * range, std::min(count, (task + 1) * range));
    });
}

}  // namespace

FarthestSearch::FarthestSearch(const FarthestParams& params, Isa isa, Precision precision)
    : rows_(params.rows),
      isa_(isa),
      precision_(precision),
      kernels_(kernels_for(isa)),
      row_kernels_(kernels_.row_kernels(params.rows.dtype)),
      next_{kInfinity, params.start},
      level_(kBeforeAll),
      wanted_active_(kFirstActive) {
    PYFEAT_CHECK(rows_.num_rows < std::numeric_limits<std::int32_t>::max(),
                 "features must have fewer than 2^31 - 1 rows, got ",
                 rows_.num_rows);
    PYFEAT_CHECK(params.start < rows_.num_rows, "start must be in [0, N), got ", params.start);
    values_.assign(to_size(rows_.num_rows), kInfinity);
    seen_.assign(to_size(rows_.num_rows), 0);
    if (params.squared_distances != nullptr) {
        std::copy_n(params.squared_distances, rows_.num_rows, values_.begin());
    }
}

std::int64_t FarthestSearch::advance(std::int64_t num_picks,
                                     double stop_squared_radius,
                                     std::int64_t* picks,
                                     double* squared_radii,
                                     Execution& execution) {
    PYFEAT_CHECK(usable_, "a search that has thrown must not be continued");
    usable_ = false;
    if (picks_.empty() && next_.row < 0) {
        next_ = farthest(execution);
    }
    std::int64_t done = 0;
    for (bool goes_on = true; goes_on && done < num_picks && next_.row >= 0; ++done) {
        picks[done] = next_.row;
        pick(next_.row, execution);
        next_ = farthest(execution);
        squared_radii[done] = std::max(next_.squared_distance, 0.0);
        goes_on = squared_radii[done] > stop_squared_radius;
    }
    usable_ = true;
    return done;
}

// The active rows see a new pick.
void FarthestSearch::pick(std::int64_t row, Execution& execution) {
    picks_.push_back(row);
    value(row) = -1.0;
    const auto found = std::lower_bound(active_.begin(), active_.end(), row);
    if (found != active_.end() && *found == row) {
        active_values_[to_size(found - active_.begin())] = -1.0;
    }
    // A task outweighs the waking of a thread.
    const std::int64_t range = 1 + (1 << 17) / (rows_.dim + 16);
    for_ranges(size_of(active_), range, execution, [&](std::int64_t first, std::int64_t end) {
        std::vector<double> center(to_size(rows_.dim));
        row_kernels_.load(rows_.row(row), 1.0, rows_.dim, center.data());
        for (std::int64_t i = first; i < end; ++i) {
            double& nearest = active_values_[to_size(i)];
            if (nearest > 0.0) {
                const void* features = active_rows_.rows.row(i);
                nearest = std::min(
                    nearest,
                    row_kernels_.squared_distance(center.data(), features, 1.0, rows_.dim));
            }
        }
    });
    active_work_ += size_of(active_);
    counters_.distances += size_of(active_);
}

Candidate FarthestSearch::farthest(Execution& execution) {
    Candidate first = first_active();
    if (!first.before(level_)) {
        lower_level(execution);
        first = first_active();
    }
    return first;
}

// Row -1 if there is none.
Candidate FarthestSearch::first_active() const {
    Candidate first{-1.0, -1};
    for (std::size_t i = 0; i < active_.size(); ++i) {
        if (active_values_[i] > first.squared_distance) {
            first = {active_values_[i], active_[i]};
        }
    }
    return first;
}

void FarthestSearch::lower_level(Execution& execution) {
    put_to_sleep();
    // More active rows cost more with every pick, but last for more picks. The sum is near its
    // least where both parts of the work are equal.
    if (2 * active_work_ < level_work_) {
        wanted_active_ = std::min(2 * wanted_active_, most_active(rows_.num_rows));
    } else if (active_work_ > 2 * level_work_) {
        wanted_active_ = std::max(wanted_active_ / 2, kLeastActive);
    }
    active_work_ = level_work_ = 0;
    ++counters_.levels;
    RowList rows;
    for (std::int64_t wanted = wanted_active_;; wanted *= 2) {
        level_ = level_for(wanted);
        rows = rows_before_level();
        catch_up(rows, execution);
        const auto behind = [&](std::int32_t row) { return !candidate(row).before(level_); };
        rows.erase(std::remove_if(rows.begin(), rows.end(), behind), rows.end());
        if (size_of(rows) > wanted_active_ / kFewer || level_.squared_distance < 0.0) {
            break;
        }
    }
    keep_first(rows);
    activate(std::move(rows), execution);
}

// A level that about so many rows are before, by what they know. From a sample of about 32 such.
Candidate FarthestSearch::level_for(std::int64_t num_rows) const {
    const std::int64_t step = std::max<std::int64_t>(num_rows / 32, 1);
    std::vector<Candidate> sample;
    std::uint64_t mixed = 0;
    for (std::int64_t first = 0; first + step <= rows_.num_rows; first += step) {
        // Scattered: rows at equal distances from each other may be alike.
        mixed += 0x9E3779B97F4A7C15U;
        const Candidate found =
            candidate(first + static_cast<std::int64_t>((mixed >> 32) % to_size(step)));
        if (found.squared_distance >= 0.0) {
            sample.push_back(found);
        }
    }
    if (size_of(sample) <= num_rows / step) {
        return kBehindAll;
    }
    const auto nth = sample.begin() + num_rows / step;
    std::nth_element(sample.begin(), nth, sample.end(), [](const Candidate& a, const Candidate& b) {
        return a.before(b);
    });
    return *nth;
}

FarthestSearch::RowList FarthestSearch::rows_before_level() const {
    RowList rows;
    rows.reserve(values_.size());  // pages that are not written take no memory
    for (std::int64_t row = 0; row < rows_.num_rows; ++row) {
        if (candidate(row).before(level_)) {
            rows.push_back(static_cast<std::int32_t>(row));
        }
    }
    return rows;
}

// Raises the level to where no more rows are before it than wanted.
void FarthestSearch::keep_first(RowList& rows) {
    if (size_of(rows) <= wanted_active_) {
        return;
    }
    const auto nth = rows.begin() + wanted_active_;
    std::nth_element(rows.begin(), nth, rows.end(), [&](std::int32_t a, std::int32_t b) {
        return candidate(a).before(candidate(b));
    });
    level_ = candidate(*nth);
    rows.erase(nth, rows.end());
    std::sort(rows.begin(), rows.end());
}

void FarthestSearch::activate(RowList rows, Execution& execution) {
    active_ = std::move(rows);
    active_values_.clear();
    for (const std::int32_t row : active_) {
        active_values_.push_back(value(row));
    }
    gather(active_, active_rows_, execution);
}

void FarthestSearch::put_to_sleep() {
    for (std::size_t i = 0; i < active_.size(); ++i) {
        value(active_[i]) = active_values_[i];
        seen_[to_size(active_[i])] = static_cast<std::int32_t>(num_seen());
    }
    active_.clear();
}

void FarthestSearch::catch_up(const RowList& rows, Execution& execution) {
    // Rows that have missed about as much, within a factor of two, catch up together. To see a pick
    // twice does no harm.
    constexpr int kGroups = 32;
    RowList groups[kGroups];
    std::int64_t first_picks[kGroups] = {};
    level_work_ += rows_.num_rows / kLooks;
    for (const std::int32_t row : rows) {
        if (is_stale(row)) {
            const std::int64_t seen = seen_[to_size(row)];
            int group = 0;
            while ((num_seen() - seen) >> (group + 1) > 0) {
                ++group;
            }
            if (groups[group].empty()) {
                groups[group].reserve(rows.size());
                first_picks[group] = seen;
            }
            first_picks[group] = std::min(seen, first_picks[group]);
            groups[group].push_back(row);
        }
    }
    const std::int64_t step = most_gathered(rows_.dim);
    for (int group = 0; group < kGroups; ++group) {
        if (groups[group].empty()) {
            continue;
        }
        for (std::int64_t first = first_picks[group]; first < num_seen(); first += step) {
            see(groups[group], first, std::min(num_seen(), first + step), execution);
        }
        for (const std::int32_t row : groups[group]) {
            seen_[to_size(row)] = static_cast<std::int32_t>(num_seen());
        }
    }
}

void FarthestSearch::see(const RowList& rows,
                         std::int64_t first_pick,
                         std::int64_t end_pick,
                         Execution& execution) {
    const std::int64_t num_rows = size_of(rows), num_picks = end_pick - first_pick;
    std::vector<double> features(to_size(num_picks * rows_.dim));
    const Rows picks{features.data(), Dtype::kFloat64, num_picks, rows_.dim, rows_.dim};
    for_ranges(num_picks, 64, execution, [&](std::int64_t first, std::int64_t end) {
        for (std::int64_t i = first; i < end; ++i) {
            const void* row = rows_.row(picks_[to_size(first_pick + i)]);
            row_kernels_.load(row, 1.0, rows_.dim, features.data() + i * rows_.dim);
        }
    });
    const std::int64_t pairs = num_rows * num_picks;
    const std::int64_t tile_work = kPacking * (num_rows + num_picks) + pairs / kLooks;
    std::optional<PackedMemory> packed;
    if (tile_work < pairs && fits_tiles(rows_, kernels_)) {
        packed.emplace(picks,
                       Metric::kSquaredEuclidean,
                       NonFinite::kRefuse,
                       isa_,
                       precision_,
                       kBoundScale,
                       execution);
    }
    level_work_ += packed ? tile_work : pairs;
    const std::int64_t step = most_gathered(rows_.dim);
    for (std::int64_t first = 0; first < num_rows; first += step) {
        const RowList part(rows.begin() + first, rows.begin() + std::min(num_rows, first + step));
        gather(part, waking_rows_, execution);
        if (packed) {
            see_in_tiles(part, picks, *packed, execution);
        } else {
            for_ranges(size_of(part), 64, execution, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) {
                    double& nearest = value(part[to_size(i)]);
                    nearest = nearest_of(picks, waking_rows_.rows.row(i), nearest, row_kernels_);
                }
            });
            counters_.distances += size_of(part) * num_picks;
        }
    }
}

void FarthestSearch::see_in_tiles(const RowList& rows,
                                  const Rows& picks,
                                  const PackedMemory& packed,
                                  Execution& execution) {
    const SearchParams params{
        "", waking_rows_.rows, picks, packed.frame.metric, Mask{}, NonFinite::kRefuse, kBoundScale};
    const ScoreLimits limits(packed.frame, rows_.dim);
    std::vector<std::int64_t> slots(rows.size());
    std::iota(slots.begin(), slots.end(), 0);
    Sweep<NearerPicks> sweep(
        params,
        Engine{&kernels_, packed.precision, kBoundScale},
        execution,
        packed.frame,
        std::move(slots),
        [&](const std::vector<std::int64_t>&, const PackedQueries& queries, std::int64_t) {
            return NearerPicks(params.queries, picks, row_kernels_, limits, queries);
        });
    const auto for_slots = [&](auto use) {
        for_ranges(size_of(rows), 64, execution, [&](std::int64_t first, std::int64_t end) {
            for (std::int64_t slot = first; slot < end; ++slot) {
                use(slot, value(rows[to_size(slot)]));
            }
        });
    };
    for_slots([&](std::int64_t slot, double nearest) {
        for (NearerPicks& slice : sweep.slices()) {
            if (!sweep.beyond(slot)) {
                slice.lower(slot, nearest);
            }
        }
    });
    for (const PackedRows& chunk : packed.chunks) {
        sweep.search(chunk);
    }
    std::atomic<std::int64_t> taken{0};
    for_slots([&](std::int64_t slot, double& nearest) {
        if (sweep.beyond(slot)) {
            nearest = nearest_of(picks, params.queries.row(slot), nearest, row_kernels_);
            taken += picks.num_rows;
            return;
        }
        for (NearerPicks& slice : sweep.slices()) {
            slice.settle(slot);
            nearest = std::min(nearest, slice.nearest(slot));
            taken += slice.num_taken(slot);
        }
    });
    counters_.distances += taken;
    counters_.products += size_of(rows) * picks.num_rows;
    // Bounds that leave more than a few of a row's picks open are too coarse for these features.
    if (taken > size_of(rows) * (4 + picks.num_rows / 16)) {
        precision_ = Precision::kFloat32;
    }
}

void FarthestSearch::gather(const RowList& rows, Gathered& gathered, Execution& execution) const {
    constexpr std::int64_t kLine = 64, kAhead = 4;
    const std::int64_t bytes = rows_.dim * bytes_of(rows_.dtype);
    const std::int64_t padded = (bytes + kLine - 1) / kLine * kLine;
    gathered.values.reserve(size_of(rows) * padded / 4);
    char* values = reinterpret_cast<char*>(gathered.values.data());
    gathered.rows = {values, rows_.dtype, size_of(rows), rows_.dim, padded / bytes_of(rows_.dtype)};
    for_ranges(size_of(rows), 64, execution, [&](std::int64_t first, std::int64_t end) {
        for (std::int64_t i = first; i < end; ++i) {
#if defined(__GNUC__)
            const auto* soon =
                static_cast<const char*>(rows_.row(rows[to_size(std::min(i + kAhead, end - 1))]));
            for (std::int64_t at = 0; at < bytes; at += kLine) {
                __builtin_prefetch(soon + at);
            }
#endif
            std::memcpy(values + i * padded, rows_.row(rows[to_size(i)]), to_size(bytes));
        }
    });
}

}  // namespace pyfeat
