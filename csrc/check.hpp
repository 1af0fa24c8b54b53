// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyfeat {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

}  // namespace pyfeat

// Guards memory: Python has already explained what a caller can get wrong.
#define PYFEAT_CHECK(condition, ...)     \
    do {                                 \
        if (!(condition)) {              \
            ::pyfeat::fail(__VA_ARGS__); \
        }                                \
    } while (false)
