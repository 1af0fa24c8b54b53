// SPDX-License-Identifier: Apache-2.0
// CUDA on a CPU, for tests: kernels are compiled unchanged by a C++ compiler, and what the toolkit
// and csrc/cuda/device provide is done here as the programming guide and the manual of PTX define
// it.
//
// Thread blocks run one after another. The threads of one are fibers that run one at a time, each
// until it waits for others. What hardware would do at some unknown time is done as late as it may
// be: copies arrive when they are waited for, and so do products of warpgroups.
//
// Kernels are compiled with -fsanitize=thread, whose hooks are ours: every access is checked. These
// end a launch with std::logic_error:
//   - threads of a warp at different instructions that take whole warps, or waiting for each other;
//   - an access outside of the shared memory of the block or of the buffers that were allowed;
//   - shared memory that is read before it is written, or before a copy into it has been waited
//   for;
//   - two threads of a block at the same byte without a barrier between, unless both read or both
//     are atomic; two blocks of a grid at the same byte of a buffer likewise;
//   - addresses that are not aligned, indices past an array, integers that overflow;
//   - products of a warpgroup without fence, commit or wait, or of what no proxy fence has
//   published.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulated_cuda {

constexpr int kWarp = 32;

// Where in the source a call is.
struct Here {
    const char* file;
    int line;
    static constexpr Here now(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// Buffers that kernels may touch, until they are forgotten.
void allow(const void* address, std::size_t bytes);
void forget(const void* address);
void forget_all();

// Properties of the device.
struct Device {
    int capability = 90;  // 10 major + minor
    int multiprocessors = 2;
    int driver_version = 13000;
    int backwards = 0;  // blocks and threads run in descending order
};
Device& device();

// A launch: body(arguments) is run by every thread.
struct Grid {
    unsigned x, y, z;
};
void launch(Grid grid,
            Grid block,
            std::size_t shared_bytes,
            const void* kernel,
            void (*body)(void*),
            void* arguments,
            std::size_t argument_bytes);

// Ends the launch. A thread that calls it does not come back.
[[noreturn]] void fail(Here here, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Waits until the given number of threads are at this barrier of the block; all of them if 0. What
// each of them combines is returned to all: the sum of values.
int block_barrier(int barrier, int threads, int value, Here here);

// What a warp does together: the last of the lanes of the mask to come does it for all.
//     perform(lanes, operands): operands[lane] is what the lane came with
using Perform = void (*)(std::uint32_t lanes, void* const* operands);
void warp_together(std::uint32_t mask, const char* what, Perform perform, void* operand, Here here);
// The same, and what lanes wrote before is seen by all of them after.
void warp_barrier(std::uint32_t mask, Here here);

// Comes back after the others had a turn.
void let_others_run(const char* what, Here here);

// The block's shared memory, and checked accesses to memory by this thread.
char* shared_memory();
std::uint32_t shared_offset(const void* pointer, Here here);
void check_read(const void* address, std::size_t bytes, Here here);
void check_write(void* address, std::size_t bytes, Here here);
void check_atomic(void* address, std::size_t bytes, Here here);
void copy_unchecked(void* to, const void* from, std::size_t bytes);
int lane();
int warp();

// Copies that a thread waits for: in flight until their group has been waited for.
void copy_async(void* shared, const void* global, int bytes, int source_bytes, Here here);
void copy_async_commit();
void copy_async_wait(int pending, Here here);

// Barriers in shared memory.
void barrier_init(std::uint64_t* barrier, int arrivals, Here here);
void barrier_arrive(std::uint64_t* barrier, int expected_bytes, Here here);
void barrier_wait(std::uint64_t* barrier, int parity, Here here);
void bulk_copy(void* shared, const void* global, int bytes, std::uint64_t* barrier, Here here);
void fence_barrier_init();
// Writes of this thread, and those that it has seen, may be read by the asynchronous proxy.
void fence_proxy_async();
void fence_memory();

// Products of four warps, over operands that descriptors of 128-byte swizzle name.
void warpgroup_fence(Here here);
void warpgroup_multiply(
    float* products, int columns, std::uint64_t a, std::uint64_t b, bool accumulate, Here here);
void warpgroup_commit(Here here);
void warpgroup_wait(int pending, Here here);

// Float32 nearest to zero of a sum, as tensor cores may round.
float toward_zero(double sum);
inline float from_bf16(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof(value));
    return value;
}

}  // namespace emulated_cuda
