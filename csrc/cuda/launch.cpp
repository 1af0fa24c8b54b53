// SPDX-License-Identifier: Apache-2.0
#include "cuda/launch.hpp"

#include <stdexcept>

namespace pyfeat::cuda {
namespace {

int attribute(const Site& site, cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, site.queue.device),
          site,
          "the device says nothing about itself");
    return value;
}

}  // namespace

void check(cudaError_t status, const Site& site, const char* what) {
    if (status == cudaSuccess) {
        return;
    }
    cudaGetLastError();  // an error of this call is not one of the next
    throw std::runtime_error(std::string(site.op) + ": " + what + ": " +
                             cudaGetErrorString(status) + " (" + site.shapes + ")");
}

int capability(const Site& site) {
    return 10 * attribute(site, cudaDevAttrComputeCapabilityMajor) +
           attribute(site, cudaDevAttrComputeCapabilityMinor);
}

int num_multiprocessors(const Site& site) {
    return attribute(site, cudaDevAttrMultiProcessorCount);
}

std::size_t max_shared_bytes(const Site& site) {
    return static_cast<std::size_t>(attribute(site, cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

DeviceGuard::DeviceGuard(const Site& site) : previous_(0), changed_(false) {
    check(cudaGetDevice(&previous_), site, "there is no current device");
    if (previous_ != site.queue.device) {
        check(cudaSetDevice(site.queue.device), site, "the device of the inputs cannot be used");
        changed_ = true;
    }
}

DeviceGuard::~DeviceGuard() {
    if (changed_) {
        cudaSetDevice(previous_);
    }
}

}  // namespace pyfeat::cuda
