// SPDX-License-Identifier: Apache-2.0
// Devices, memory and launches, of the runtime's interface.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "emulation.hpp"
#include "vector_types.hpp"

#define CUDART_VERSION 13000

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute {
    int id;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t status) {
    switch (status) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
    }
    return "unknown error";
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = emulated_cuda::device().driver_version;
    return cudaSuccess;
}

// Two devices that are alike.
inline int& emulated_cuda_current_device() {
    static int current = 0;
    return current;
}
inline cudaError_t cudaGetDevice(int* index) {
    *index = emulated_cuda_current_device();
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index > 1) {
        return cudaErrorInvalidDevice;
    }
    emulated_cuda_current_device() = index;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    const emulated_cuda::Device& device = emulated_cuda::device();
    const bool large = device.capability == 80 || device.capability / 10 >= 9;
    switch (which) {
        case cudaDevAttrMultiProcessorCount:
            *value = device.multiprocessors;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = device.capability / 10;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = device.capability % 10;
            break;
        case cudaDevAttrL2CacheSize:
            *value = 50 << 20;
            break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = (large ? (device.capability == 80 ? 164 : 228) : 100) << 10;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = (large ? (device.capability == 80 ? 163 : 227) : 99) << 10;
            break;
    }
    return cudaSuccess;
}

// Memory: kernels may touch what is allocated and nothing else. It starts as NaN.
inline cudaError_t cudaMalloc(void** address, std::size_t bytes) {
    *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (*address == nullptr) {
        return cudaErrorMemoryAllocation;
    }
    std::memset(*address, 0xFF, bytes);
    emulated_cuda::allow(*address, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
    emulated_cuda::forget(address);
    std::free(address);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}

// Shared memory beyond 48 KiB, by kernel.
inline std::map<const void*, int>& emulated_cuda_shared_limits() {
    static std::map<const void*, int> limits;
    return limits;
}
template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
    int most = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    if (bytes < 0 || bytes > most) {
        return cudaErrorInvalidValue;
    }
    emulated_cuda_shared_limits()[reinterpret_cast<const void*>(kernel)] = bytes;
    return cudaSuccess;
}
template <typename T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                          T*,
                                                          int threads,
                                                          std::size_t shared_bytes) {
    int shared = 0;
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0);
    const int by_shared =
        static_cast<int>(static_cast<std::size_t>(shared) / (shared_bytes + 1024));
    const int by_threads = 1536 / threads;
    *blocks = by_shared < by_threads ? by_shared : by_threads;
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    using Kernel = void (*)(Parameters...);
    const dim3 grid = config->gridDim, block = config->blockDim;
    const std::size_t threads = std::size_t{1} * block.x * block.y * block.z;
    auto& limits = emulated_cuda_shared_limits();
    const auto limit = limits.find(reinterpret_cast<const void*>(kernel));
    const auto shared = static_cast<std::size_t>(limit == limits.end() ? 48 << 10 : limit->second);
    if (config->numAttrs != 0 || grid.x == 0 || grid.x > 0x7FFFFFFFU || grid.y == 0 ||
        grid.y > 65535 || grid.z == 0 || grid.z > 65535 || threads == 0 || threads > 1024 ||
        block.z > 64) {
        return cudaErrorInvalidConfiguration;
    }
    if (config->dynamicSmemBytes > shared) {
        return cudaErrorInvalidValue;
    }
    std::tuple<Kernel, std::tuple<Parameters...>> call(
        kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
    emulated_cuda::launch(
        {grid.x, grid.y, grid.z},
        {block.x, block.y, block.z},
        config->dynamicSmemBytes,
        reinterpret_cast<const void*>(kernel),
        [](void* data) {
            const auto& [function, parameters] = *static_cast<decltype(call)*>(data);
            std::apply(function, parameters);
        },
        &call,
        sizeof(call));
    return cudaSuccess;
}
