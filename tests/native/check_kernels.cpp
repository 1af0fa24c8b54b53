// SPDX-License-Identifier: Apache-2.0
// Checks the kernels of one instruction set, PYFEAT_CHECKED, against float64 and against the scalar
// ones, without Python: it also runs under an emulator. Prints what is wrong; exits with 1 then.
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

#include "cpu/similarity/kernels.hpp"

namespace {

using namespace pyfeat;

const Kernels& checked = PYFEAT_CHECKED::kernels;
int num_wrong = 0;

// Of the bits of all products: kernels that add up in the same order have the same.
std::uint64_t fingerprint = 14695981039346656037U;

void add_to_fingerprint(const float* products, int count) {
    for (int i = 0; i < count; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, products + i, sizeof(bits));
        fingerprint = (fingerprint ^ bits) * 1099511628211U;
    }
}

// Floats on a 64-byte boundary, NaN where nothing is written.
class AlignedFloats {
  public:
    explicit AlignedFloats(std::int64_t count)
        : room_(static_cast<std::size_t>(count) + 16, std::numeric_limits<float>::quiet_NaN()) {
        const auto address = reinterpret_cast<std::uintptr_t>(room_.data());
        data_ = room_.data() + (64 - address % 64) % 64 / 4;
    }
    float* data() {
        return data_;
    }

  private:
    std::vector<float> room_;
    float* data_;
};

void expect(bool right, const char* what, int precision, std::int64_t dim) {
    if (!right) {
        std::printf("%s is wrong, precision %d, D = %lld\n", what, precision, (long long)dim);
        ++num_wrong;
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

// The products of one tile, as powers of two, and what a loss does with them.
void check_contrast(std::mt19937& random) {
    const TileKernels& tiles = checked.tile_kernels(Precision::kFloat32);
    const int num_rows = tiles.queries, num_columns = tiles.rows;
    std::normal_distribution<float> normal;
    AlignedFloats products(num_rows * num_columns);
    AlignedFloats bias(num_columns), row_ids(num_rows), column_ids(num_columns);
    AlignedFloats row_terms(3 * num_rows), column_terms(3 * num_columns + 64);
    AlignedFloats gradient(num_rows * kGradientStride);
    const auto fill = [&](AlignedFloats& values, int count, auto make) {
        for (int i = 0; i < count; ++i) {
            const auto value = make();
            std::memcpy(values.data() + i, &value, sizeof(float));
        }
    };
    const auto id = [&] { return static_cast<std::int32_t>(random() % 4); };
    const auto shift = [&] { return std::rint(normal(random)) + 4.0F; };
    fill(products, num_rows * num_columns, [&] { return normal(random); });
    fill(bias, num_columns, [&] { return normal(random); });
    fill(row_ids, num_rows, id);
    fill(column_ids, num_columns, id);
    float* rows[3];
    float* columns[3];  // on 64-byte boundaries
    for (int i = 0; i < 3; ++i) {
        rows[i] = row_terms.data() + i * num_rows;
        columns[i] = column_terms.data() + i * 32;
        for (int r = 0; r < num_rows; ++r) {
            rows[i][r] = i == 0 ? shift() : normal(random);
        }
        for (int c = 0; c < num_columns; ++c) {
            columns[i][c] = i == 0 ? shift() : normal(random);
        }
    }
    for (const bool separate : {false, true}) {
        const PairTile pairs{
            bias.data(), row_ids.data(), column_ids.data(), nullptr, nullptr, false, separate};
        double row_sums[kMaxTileQueries] = {}, expected_sums[kMaxTileQueries] = {};
        AlignedFloats tile(num_rows * num_columns);
        std::memcpy(tile.data(),
                    products.data(),
                    static_cast<std::size_t>(num_rows * num_columns) * sizeof(float));
        checked.contrast.adjust(tile.data(), pairs, {row_sums, nullptr});
        checked.contrast.gradient(products.data(),
                                  pairs,
                                  {rows[0], rows[1], rows[2]},
                                  {columns[0], columns[1], columns[2]},
                                  gradient.data());
        for (int r = 0; r < num_rows; ++r) {
            for (int c = 0; c < num_columns; ++c) {
                const float x = products.data()[r * num_columns + c] + bias.data()[c];
                const bool positive =
                    std::memcmp(row_ids.data() + r, column_ids.data() + c, sizeof(float)) == 0;
                expected_sums[r] += positive ? static_cast<double>(x) : 0.0;
                const float kept = positive && separate ? kNoProduct : x;
                expect(tile.data()[r * num_columns + c] == kept, "adjusted product", 0, separate);
                double exact = 0.0;
                if (!positive || !separate) {
                    exact = rows[1][r] * std::exp2(static_cast<double>(x) - rows[0][r]) +
                            columns[1][c] * std::exp2(static_cast<double>(x) - columns[0][c]);
                }
                exact += positive ? static_cast<double>(rows[2][r]) + columns[2][c] : 0.0;
                expect(std::abs(gradient.data()[r * kGradientStride + c] - exact) <= 1e-5,
                       "gradient of a pair",
                       0,
                       separate);
            }
            expect(std::abs(row_sums[r] - expected_sums[r]) <= 1e-5, "positive sum", 0, separate);
        }
    }
    // Products with features: all rows of the tile but the last are written.
    constexpr int kCount = 5;
    AlignedFloats factor(kCount * kGradientStride), panel(kCount * num_columns);
    AlignedFloats sums(num_rows * num_columns), transposed(num_rows * num_columns);
    const auto feature = [&] { return normal(random); };
    fill(gradient, num_rows * static_cast<int>(kGradientStride), feature);
    fill(factor, kCount * static_cast<int>(kGradientStride), feature);
    fill(panel, kCount * num_columns, feature);
    fill(sums, num_rows * num_columns, [] { return 1.0F; });
    fill(transposed, num_rows * num_columns, [] { return 1.0F; });
    const auto& contrast = checked.contrast;
    contrast.multiply(
        kCount, gradient.data(), panel.data(), sums.data(), num_columns, num_rows - 1);
    contrast.multiply_transposed(
        kCount, factor.data(), panel.data(), transposed.data(), num_columns, num_rows - 1);
    for (int r = 0; r < num_rows; ++r) {
        for (int d = 0; d < num_columns; ++d) {
            double plain = 1.0, turned = 1.0;
            for (int w = 0; w < kCount && r < num_rows - 1; ++w) {
                const double value = panel.data()[w * num_columns + d];
                plain += gradient.data()[r * kGradientStride + w] * value;
                turned += factor.data()[w * kGradientStride + r] * value;
            }
            const int at = r * num_columns + d;
            expect(std::abs(sums.data()[at] - plain) <= 1e-5, "product with features", 0, d);
            expect(std::abs(transposed.data()[at] - turned) <= 1e-5, "its transpose", 0, d);
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
    check_contrast(random);
    check_largest_bytes();
    std::printf("fingerprint %llx, %d wrong\n", (unsigned long long)fingerprint, num_wrong);
    return num_wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
