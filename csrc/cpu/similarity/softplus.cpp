// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/softplus.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.hpp"
#include "cpu/similarity/gradient_products.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/pair_terms.hpp"
#include "cpu/similarity/products.hpp"

namespace pyfeat {
namespace {

constexpr std::int64_t kPadding = kMaxTileQueries + kMaxTileRows;

AlignedFloats padded(const double* values, std::int64_t count, double factor) {
    AlignedFloats filled;
    filled.reserve(count + kPadding);
    std::fill_n(filled.data(), count + kPadding, 0.0F);
    for (std::int64_t i = 0; i < count; ++i) {
        filled.data()[i] = static_cast<float>(factor * values[i]);
    }
    return filled;
}

// Epilogue of GradientProducts. A task has its rows to itself, so that sums need no parts.
class Softplus {
  public:
    Softplus(const SoftplusParams& params, double unit, const ContrastEngine& engine)
        : kernel_(engine.contrast.softplus),
          lanes_(engine.kernels.powers.lanes),
          height_(engine.tiles.queries),
          terms_(params.pairs, params.a.num_rows, params.b.num_rows, engine.tiles),
          weights_(padded(params.weights, params.a.num_rows, params.scale / unit)) {
        const double bias = params.bias / Base2::kLog;
        bias_ = static_cast<float>(bias);
        // A bias that loses more than this to rounding outweighs every product.
        const double rest = bias - static_cast<double>(bias_);
        bias_rest_ = std::abs(rest) < 0x1p-10 ? static_cast<float>(rest) : 0.0F;
        for (std::vector<double>* sums : {&softplus_, &sigmoids_}) {
            sums->assign(to_size(params.a.num_rows + kPadding), 0.0);
        }
    }

    void write(const SoftplusParams& params) const {
        for (std::int64_t i = 0; i < params.a.num_rows; ++i) {
            params.softplus[i] = softplus_[to_size(i)];
            params.sigmoids[i] = sigmoids_[to_size(i)];
        }
    }

    class Strip {
      public:
        Strip(Softplus& whole, std::int64_t row) : whole_(whole), row_(row) {
            std::fill_n(softplus_, whole_.height_ * whole_.lanes_, 0.0F);
            std::fill_n(sigmoids_, whole_.height_ * whole_.lanes_, 0.0F);
        }

        void add(const float* products, std::int64_t column, int num_columns, float* gradient) {
            whole_.kernel_(
                products,
                whole_.terms_.tile(row_, column),
                {whole_.bias_, whole_.bias_rest_, num_columns, whole_.weights_.data() + row_},
                {softplus_, sigmoids_},
                gradient);
        }
        // float32 sums have got a term for every register of a strip: kGradientColumns / lanes.
        void end() {
            for (int i = 0; i < whole_.height_ * whole_.lanes_; ++i) {
                const std::int64_t row = row_ + i / whole_.lanes_;
                whole_.softplus_[to_size(row)] += static_cast<double>(softplus_[i]);
                whole_.sigmoids_[to_size(row)] += static_cast<double>(sigmoids_[i]);
            }
        }

      private:
        Softplus& whole_;
        std::int64_t row_;
        alignas(64) float softplus_[kMaxTileQueries * kMaxLanes];
        alignas(64) float sigmoids_[kMaxTileQueries * kMaxLanes];
    };

  private:
    decltype(ContrastKernels::softplus) kernel_;
    int lanes_, height_;
    PaddedTerms terms_;
    AlignedFloats weights_;
    float bias_, bias_rest_;
    std::vector<double> softplus_, sigmoids_;  // [L]
};

}  // namespace

void softplus_cpu(const SoftplusParams& params, Isa isa, Execution& execution) {
    const ContrastEngine engine = gradient_engine(isa, params.a, params.b, params.products);
    const ProductFactors factors = checked_factors(
        "softplus", params.a, params.b, params.scale, kLargestProduct, engine, execution);
    PYFEAT_CHECK(std::abs(params.bias) <= 1e36,
                 "softplus: bias must be at most 1e36 in magnitude, got ",
                 params.bias);
    const double unit = gradient_unit(engine, params.scale, {{params.weights, params.a.num_rows}});
    Softplus epilogue(params, unit, engine);
    GradientProducts<Softplus>({params.a, params.b, factors, unit, {}},
                               params.products,
                               false,
                               epilogue,
                               engine,
                               execution)
        .run();
    epilogue.write(params);
}

}  // namespace pyfeat
