// SPDX-License-Identifier: Apache-2.0
#include "cuda/build.hpp"

#include <cuda_runtime.h>

#include <cstring>
#include <sstream>

namespace pyfeat::cuda {

std::vector<std::string> architectures() {
    std::istringstream list(PYFEAT_CUDA_ARCHITECTURES);
    std::vector<std::string> names;
    for (std::string name; std::getline(list, name, ',');) {
        names.push_back(name);
    }
    return names;
}

bool is_built_for(const char* architecture) {
    return std::strstr(PYFEAT_CUDA_ARCHITECTURES, architecture) != nullptr;
}

int runtime_version() {
    return CUDART_VERSION;
}

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace pyfeat::cuda
