// SPDX-License-Identifier: Apache-2.0
// What the checks of kernels share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "cpu/similarity/kernels.hpp"

// What is checked; checked.cpp says of which instruction set.
extern const pyfeat::Kernels& checked;

namespace {

using namespace pyfeat;

int num_wrong = 0;

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

}  // namespace
