// SPDX-License-Identifier: Apache-2.0
#include "cpu/similarity/contrast.hpp"

#include <algorithm>
#include <cmath>

#include "check.hpp"
#include "cpu/similarity/gradient_products.hpp"
#include "cpu/similarity/kernels.hpp"
#include "cpu/similarity/pack.hpp"
#include "cpu/similarity/pair_terms.hpp"
#include "cpu/similarity/products.hpp"

namespace pyfeat {
namespace {

// The terms of rows or of columns in float32, filled up for the last panel.
class PaddedGradientTerms {
  public:
    // Null lse: they have no part.
    PaddedGradientTerms(const double* lse,
                        const double* weights,
                        const double* positives,
                        std::int64_t count,
                        double scale) {
        if (lse == nullptr) {
            return;
        }
        const std::int64_t padded = count + kMaxTileQueries + kMaxTileRows;
        for (AlignedFloats* values : {&shifts_, &weights_, &positives_}) {
            values->reserve(padded);
            std::fill_n(values->data(), padded, 0.0F);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            // weight * exp(S - lse) = weight' * 2^(S / ln 2 - shift) with a whole shift.
            const double exponent = lse[i] / Base2::kLog;
            const double shift = std::isfinite(exponent) ? std::rint(exponent) : 0.0;
            const double factor = std::isfinite(exponent) ? std::exp2(shift - exponent) : 0.0;
            shifts_.data()[i] = static_cast<float>(shift);
            weights_.data()[i] = static_cast<float>(scale * weights[i] * factor);
            positives_.data()[i] = static_cast<float>(scale * positives[i]);
        }
    }

    GradientTerms from(std::int64_t first) const {
        if (shifts_.data() == nullptr) {
            return {nullptr, nullptr, nullptr};
        }
        return {shifts_.data() + first, weights_.data() + first, positives_.data() + first};
    }

  private:
    AlignedFloats shifts_, weights_, positives_;
};

// Epilogue of GradientProducts.
class SoftmaxGradient {
  public:
    SoftmaxGradient(const ContrastGradientParams& params, double unit, const ContrastEngine& engine)
        : kernel_(engine.contrast.gradient),
          terms_(params.pairs, params.a.num_rows, params.b.num_rows, engine.tiles),
          rows_(params.row_lse,
                params.row_weights,
                params.row_positives,
                params.a.num_rows,
                params.scale / unit),
          columns_(params.column_lse,
                   params.column_weights,
                   params.column_positives,
                   params.b.num_rows,
                   params.scale / unit) {}

    class Strip {
      public:
        Strip(const SoftmaxGradient& whole, std::int64_t row) : whole_(whole), row_(row) {}

        void add(const float* products, std::int64_t column, int, float* gradient) const {
            whole_.kernel_(products,
                           whole_.terms_.tile(row_, column),
                           whole_.rows_.from(row_),
                           whole_.columns_.from(column),
                           gradient);
        }
        void end() const {}

      private:
        const SoftmaxGradient& whole_;
        std::int64_t row_;
    };

  private:
    decltype(ContrastKernels::gradient) kernel_;
    PaddedTerms terms_;
    PaddedGradientTerms rows_, columns_;
};

}  // namespace

void contrast_gradient_cpu(const ContrastGradientParams& params, Isa isa, Execution& execution) {
    const ContrastEngine engine = gradient_engine(isa, params.a, params.b, params.products);
    const ProductFactors factors = checked_factors(
        "contrast", params.a, params.b, params.scale, kLargestProduct, engine, execution);
    const std::int64_t num_columns = params.column_lse == nullptr ? 0 : params.b.num_rows;
    const double unit = gradient_unit(engine,
                                      params.scale,
                                      {{params.row_weights, params.a.num_rows},
                                       {params.row_positives, params.a.num_rows},
                                       {params.column_weights, num_columns},
                                       {params.column_positives, num_columns}});
    SoftmaxGradient epilogue(params, unit, engine);
    GradientProducts<SoftmaxGradient>({params.a, params.b, factors, unit, params.kept},
                                      params.products,
                                      params.itself,
                                      epilogue,
                                      engine,
                                      execution)
        .run();
}

}  // namespace pyfeat
