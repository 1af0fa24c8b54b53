// SPDX-License-Identifier: Apache-2.0
// What the checks of -fsanitize=undefined call, of which hardware says nothing either.
#include <cstdio>
#include <cstdlib>

#include "state.hpp"

namespace emulated_cuda {
namespace {

// What all their data begins with.
struct Location {
    const char* file;
    std::uint32_t line, column;
};

void undefined(const void* data, const char* what) {
    const auto* location = static_cast<const Location*>(data);
    const Here here{location->file, static_cast<int>(location->line)};
    if (block().current == nullptr) {
        std::fprintf(stderr, "%s (%s:%d)\n", what, here.file, here.line);
        std::abort();
    }
    fail(here, "%s", what);
}

}  // namespace
}  // namespace emulated_cuda

#define CHECK(name, what, ...)                                                         \
    extern "C" __attribute__((visibility("hidden"), used)) void __ubsan_handle_##name( \
        void* data, ##__VA_ARGS__) {                                                   \
        emulated_cuda::undefined(data, what);                                          \
    }
CHECK(type_mismatch_v1, "an address that is not aligned for its type, or null", void*)
CHECK(out_of_bounds, "an index past an array", void*)
CHECK(add_overflow, "a sum of integers that overflows", void*, void*)
CHECK(sub_overflow, "a difference of integers that overflows", void*, void*)
CHECK(mul_overflow, "a product of integers that overflows", void*, void*)
CHECK(negate_overflow, "an integer that has no negative", void*)
CHECK(divrem_overflow, "a division of integers by 0 or that overflows", void*, void*)
CHECK(shift_out_of_bounds, "a shift by more than there is", void*, void*)
CHECK(float_cast_overflow, "a conversion to an integer that cannot hold it", void*)
