// SPDX-License-Identifier: Apache-2.0
// How kernels are launched: on the device and the stream of torch, without waiting for either, and
// with errors that name the op and its shapes.
//
//     const Site site{"knn", "queries [5, 3], memory [9, 3]", queue};
//     const DeviceGuard guard(site);
//     launch(site, {dim3(tiles), dim3(256), shared_bytes}, kernel, params);
//
// Entries allocate nothing, keep nothing and wait for nothing, so that a graph can capture them:
// workspaces come from torch, through Python.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace pyfeat::cuda {

// Where torch wants the work: the device of the tensors, and its current stream there.
struct Queue {
    int device;
    cudaStream_t stream;
};

// What an error says about the call.
struct Site {
    const char* op;
    std::string shapes;  // for example "queries [5, 3], memory [9, 3]"
    Queue queue;
};

struct Launch {
    dim3 grid, block;
    std::size_t shared_bytes = 0;  // dynamic shared memory of a block
};

// Dynamic shared memory that a kernel has without asking for more.
constexpr std::size_t kSharedBytes = 48 << 10;

// Throws std::runtime_error unless status is cudaSuccess: "op: what failed: why (shapes)".
void check(cudaError_t status, const Site& site, const char* what);

// Properties of the device of a queue.
int capability(const Site& site);  // 10 major + minor, for example 90
int num_multiprocessors(const Site& site);
std::size_t max_shared_bytes(const Site& site);  // that a block can ask for

// Makes the device of a queue the current one, and the one before it again at the end.
class DeviceGuard {
  public:
    explicit DeviceGuard(const Site& site);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_;
    bool changed_;
};

// Puts kernel(arguments...) into the queue. An empty grid is no work. A DeviceGuard must be alive.
template <typename... Parameters, typename... Arguments>
void launch(const Site& site,
            const Launch& launch,
            void (*kernel)(Parameters...),
            Arguments&&... arguments) {
    if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) {
        return;
    }
    if (launch.shared_bytes > kSharedBytes) {
        check(cudaFuncSetAttribute(kernel,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(launch.shared_bytes)),
              site,
              "a kernel cannot have its shared memory");
    }
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = launch.block;
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = site.queue.stream;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...),
          site,
          "a kernel cannot be launched");
}

}  // namespace pyfeat::cuda
