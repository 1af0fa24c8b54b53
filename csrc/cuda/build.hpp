// SPDX-License-Identifier: Apache-2.0
// What the module was built with, and what the driver is.
#pragma once

#include <string>
#include <vector>

namespace pyfeat::cuda {

// As CMake takes them: "80-real" is machine code, "90-virtual" is PTX, "90a" is of one chip only.
std::vector<std::string> architectures();

// Whether there is machine code for this one: "90a".
bool is_built_for(const char* architecture);

// 1000 major + 10 minor, for example 13000 for CUDA 13.0.
int runtime_version();
int driver_version();  // of the newest CUDA that the driver supports; 0 without a driver

}  // namespace pyfeat::cuda
