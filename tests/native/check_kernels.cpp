// SPDX-License-Identifier: Apache-2.0
// Checks the kernels of one instruction set against float64 and against the scalar ones, without
// Python: it also runs under an emulator. Prints what is wrong; exits with 1 then.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "check_contrast.hpp"
#include "checks.hpp"
#include "cpu/similarity/kernels.hpp"

namespace {

// Of the bits of all products: kernels that add up in the same order have the same.
std::uint64_t fingerprint = 14695981039346656037U;

void add_to_fingerprint(const float* products, int count) {
    for (int i = 0; i < count; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, products + i, sizeof(bits));
        fingerprint = (fingerprint ^ bits) * 1099511628211U;
    }
}

void check_sums(std::int64_t dim, std::mt19937& random) {
    std::normal_distribution<double> normal;
    const auto size = static_cast<std::size_t>(dim);
    std::vector<double> query(size), mean(size), values(size), expected(size);
    std::vector<unsigned char> row(8 * size);
    for (int dtype = 0; dtype < kNumDtypes; ++dtype) {
        const RowKernels& ours = checked.rows[dtype];
        const RowKernels& theirs = scalar::kernels.rows[dtype];
        for (std::size_t d = 0; d < size; ++d) {
            query[d] = normal(random);
            mean[d] = normal(random);
            const auto value = normal(random);
            const auto single = static_cast<float>(value);
            std::uint32_t bits;
            std::memcpy(&bits, &single, sizeof(bits));
            const auto half = static_cast<std::uint16_t>(random() & 0xBBFFU);  // finite as float16
            const auto bfloat = static_cast<std::uint16_t>(bits >> 16);
            switch (static_cast<Dtype>(dtype)) {
                case Dtype::kFloat32:
                    std::memcpy(&row[4 * d], &single, 4);
                    break;
                case Dtype::kFloat64:
                    std::memcpy(&row[8 * d], &value, 8);
                    break;
                case Dtype::kFloat16:
                    std::memcpy(&row[2 * d], &half, 2);
                    break;
                case Dtype::kBfloat16:
                    std::memcpy(&row[2 * d], &bfloat, 2);
                    break;
            }
        }
        const void* x = row.data();
        const double* q = query.data();
        expect(ours.squared_norm(x, dim) == theirs.squared_norm(x, dim), "norm", dtype, dim);
        expect(ours.dot(q, x, dim) == theirs.dot(q, x, dim), "dot", dtype, dim);
        expect(ours.squared_distance(q, x, 0.3, dim) == theirs.squared_distance(q, x, 0.3, dim),
               "distance",
               dtype,
               dim);
        const Transform transform{mean.data(), 0.25};
        const TransformedRow a = ours.transform(x, 0.7, dim, transform, values.data());
        const TransformedRow b = theirs.transform(x, 0.7, dim, transform, expected.data());
        expect(a.squared_norm == b.squared_norm && a.mean_product == b.mean_product &&
                   a.largest == b.largest && values == expected,
               "transform",
               dtype,
               dim);
    }
}

void check_tiles(const TileKernels& tiles, int precision, std::int64_t dim, std::mt19937& random) {
    std::normal_distribution<double> normal;
    const auto size = static_cast<std::size_t>(dim);
    const auto num_rows = static_cast<std::size_t>(tiles.rows);
    const auto num_queries = static_cast<std::size_t>(tiles.queries);
    std::vector<std::vector<double>> rows(num_rows), queries(num_queries);
    AlignedFloats row_panel(tiles.row_words(dim) * tiles.rows);
    AlignedFloats query_panel(tiles.words(dim) * tiles.queries);
    AlignedFloats terms(tiles.rows), units(tiles.rows);
    const auto make = [&](std::vector<double>& values) {
        double largest = 0.0;
        values.resize(size);
        for (double& value : values) {
            value = normal(random);
            largest = std::max(largest, std::abs(value));
        }
        return largest;
    };
    const auto norm_of = [](const std::vector<double>& values) {
        double squared = 0.0;
        for (const double value : values) {
            squared += value * value;
        }
        return std::sqrt(squared);
    };
    std::vector<double> row_residuals(num_rows), query_residuals(num_queries);
    std::vector<float> query_units(num_queries), norms(num_queries), errors(num_queries),
        thresholds(num_queries);
    for (std::size_t c = 0; c < num_rows; ++c) {
        const double largest = make(rows[c]);
        const RoundedRow done =
            tiles.pack_row(rows[c].data(), dim, largest, row_panel.data(), static_cast<int>(c));
        row_residuals[c] = std::sqrt(done.squared_residual);
        units.data()[c] = done.unit;
        terms.data()[c] = static_cast<float>(normal(random));
    }
    terms.data()[num_rows - 1] = std::numeric_limits<float>::quiet_NaN();
    for (std::size_t r = 0; r < num_queries; ++r) {
        const double largest = make(queries[r]);
        const RoundedRow done = tiles.pack_query(
            queries[r].data(), dim, largest, query_panel.data(), static_cast<int>(r));
        query_residuals[r] = std::sqrt(done.squared_residual);
        query_units[r] = done.unit;
        thresholds[r] =
            r == 0 ? -std::numeric_limits<float>::infinity() : static_cast<float>(normal(random));
    }
    // Rows of scores without a mark are not written.
    alignas(64) float scores[kMaxTileQueries * kMaxTileRows];
    alignas(64) float products[kMaxTileQueries * kMaxTileRows];
    std::uint32_t marks[kMaxTileQueries], all_marks[kMaxTileQueries];
    Tile tile{tiles.words(dim),
              query_panel.data(),
              row_panel.data(),
              terms.data(),
              units.data(),
              query_units.data(),
              norms.data(),
              errors.data(),
              thresholds.data(),
              {0.0F, 0.0F, 0.125F}};
    const std::vector<float> open(num_queries, std::numeric_limits<float>::infinity());
    {
        const TileUse use(tiles);
        tiles.multiply(tiles.words(dim), query_panel.data(), row_panel.data(), products);
        add_to_fingerprint(products, tiles.queries * tiles.rows);
        const bool any = tiles.score(tile, scores, marks);
        expect(any == std::any_of(marks, marks + num_queries, [](auto mark) { return mark != 0; }),
               "whether there are marks",
               precision,
               dim);
        tile.thresholds = open.data();
        tiles.score(tile, scores, all_marks);
    }
    const double n = tiles.roundings_per_feature * static_cast<double>(dim) + tiles.roundings + 2;
    for (std::size_t r = 0; r < num_queries; ++r) {
        for (std::size_t c = 0; c < num_rows; ++c) {
            const float score = scores[r * num_rows + c];
            double exact_product = 0.0;
            for (std::size_t d = 0; d < size; ++d) {
                exact_product += queries[r][d] * rows[c][d];
            }
            const double exact = terms.data()[c] - exact_product;
            const double q = norm_of(queries[r]) + query_residuals[r];
            const double x = norm_of(rows[c]) + row_residuals[c];
            const double product_bound =
                query_residuals[r] * x + q * row_residuals[c] + 1e-7 * n * (q * x + 1e-30);
            const double bound = product_bound + 1e-7 * n * std::abs(terms.data()[c]);
            const bool last = c == num_rows - 1;
            const bool whole_numbers = tiles.roundings_per_feature == 0;
            std::int32_t number;
            std::memcpy(&number, &products[r * num_rows + c], sizeof(number));
            const double product =
                whole_numbers ? static_cast<double>(number) * query_units[r] * units.data()[c]
                              : products[r * num_rows + c];
            expect(std::abs(product - exact_product) <= product_bound, "product", precision, dim);
            expect(((all_marks[r] >> c) & 1U) == (last ? 0U : 1U), "open mark", precision, dim);
            expect(last ? std::isnan(score) : std::abs(score - exact) <= bound,
                   "score",
                   precision,
                   dim);
            const bool marked = ((marks[r] >> c) & 1U) != 0;
            const double limit = static_cast<double>(thresholds[r]) + 0.125;
            if (last || r == 0) {
                expect(!marked, "mark of nothing", precision, dim);
            } else if (std::abs(score - limit) > 1e-4) {
                expect(marked == (score < limit), "mark", precision, dim);
            }
        }
    }
}

void check_largest_bytes() {
    // Bytes at their limits, where narrow sums would overflow.
    const std::int64_t dim = 4096;
    const TileKernels& tiles = checked.tile_kernels(Precision::kInt8);
    const std::vector<double> ones(static_cast<std::size_t>(dim), 1.0);
    AlignedFloats rows(tiles.row_words(dim) * tiles.rows);
    AlignedFloats queries(tiles.words(dim) * tiles.queries);
    alignas(64) float terms[kMaxTileRows] = {}, units[kMaxTileRows];
    float query_units[kMaxTileQueries], zeros[kMaxTileQueries] = {};
    for (int c = 0; c < tiles.rows; ++c) {
        units[c] = tiles.pack_row(ones.data(), dim, 1.0, rows.data(), c).unit;
    }
    for (int r = 0; r < tiles.queries; ++r) {
        query_units[r] = tiles.pack_query(ones.data(), dim, 1.0, queries.data(), r).unit;
    }
    alignas(64) float scores[kMaxTileQueries * kMaxTileRows];
    std::uint32_t marks[kMaxTileQueries];
    const Tile tile{tiles.words(dim),
                    queries.data(),
                    rows.data(),
                    terms,
                    units,
                    query_units,
                    zeros,
                    zeros,
                    zeros,
                    {}};
    const TileUse use(tiles);
    tiles.score(tile, scores, marks);
    for (int i = 0; i < tiles.queries * tiles.rows; ++i) {
        expect(std::abs(scores[i] + 4096.0F) < 0.01F, "sum of the largest bytes", 2, dim);
    }
}

}  // namespace

int main() {
#if defined(__linux__) && defined(__x86_64__)
    syscall(SYS_arch_prctl, 0x1023, 18);  // asks for the registers of matrix units
#endif
    std::mt19937 random(1);
    for (const std::int64_t dim : {0, 1, 3, 4, 5, 16, 31, 64, 333, 2048}) {
        check_sums(dim, random);
        for (int precision = 0; precision < kNumPrecisions; ++precision) {
            for (int repeat = 0; repeat < 5; ++repeat) {
                check_tiles(checked.tiles[precision], precision, dim, random);
            }
        }
    }
    for (const ContrastKernels* contrast : {&checked.contrast, &checked.bf16_contrast}) {
        check_contrast(*contrast, random);
    }
    for (const bool itself : {false, true}) {
        for (const std::int64_t num_rows : {1, 95, 97, 200, 389, 1000, 2500}) {
            check_schedule(num_rows, num_rows, itself);
        }
    }
    check_schedule(70, 1000, false);
    check_lanes(random);
    check_largest_bytes();
    std::printf("fingerprint %llx, %d wrong\n", (unsigned long long)fingerprint, num_wrong);
    return num_wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
