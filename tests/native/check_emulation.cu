// SPDX-License-Identifier: Apache-2.0
// Kernels with one fault each, of the kinds that hardware does not report, and some without. Prints
// a line for each: its name, and what the emulation says.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cuda/device/barrier.cuh"
#include "cuda/device/bulk_copy.cuh"
#include "cuda/device/copy_async.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/launch.hpp"

namespace pyfeat::cuda {
namespace {

int thread() {
    return static_cast<int>(threadIdx.x);
}
int* shared_integers() {
    return reinterpret_cast<int*>(dynamic_shared());
}

// Of the block and the warp

__global__ void part_at_a_barrier(int* out) {
    if (thread() < 32) {
        __syncthreads();
    }
    out[thread()] = 1;
}
__global__ void part_at_a_shuffle(int* out) {
    if (thread() % 2 == 0) {
        out[thread()] = __shfl_sync(kWholeWarp, thread(), 0);
    } else {
        __syncwarp();
    }
}
__global__ void leave_before_a_vote(int* out) {
    if (thread() == 7) {
        return;
    }
    out[thread()] = static_cast<int>(__ballot_sync(kWholeWarp, 1));
}
__global__ void shuffle_without_oneself(int* out) {
    out[thread()] = __shfl_sync(0xFFFFU, thread(), 0);
}
__global__ void wait_for_too_many(int* out) {
    named_barrier_sync<3, 96>();
    out[thread()] = 1;
}

// Of memory

__global__ void read_past_the_end(int* out) {
    out[thread()] = out[64 - thread() / 63];
}
__global__ void write_before_the_beginning(int* out) {
    out[thread() - 1] = 1;
}
__global__ void read_unaligned(int* out) {
    out[0] = reinterpret_cast<const int2*>(out + 1)->x;
}
__global__ void index_past_an_array(int* out) {
    int own[4] = {1, 2, 3, 4};
    out[thread()] = own[thread() / 15];
}
__global__ void overflow_an_integer(int* out) {
    out[thread()] = thread() * 0x7FFFFFF;
}
__global__ void convert_what_is_too_large(int* out) {
    out[thread()] = static_cast<int>(static_cast<float>(thread()) * 1e8F);
}
__global__ void write_past_shared_memory(int*) {
    shared_integers()[thread() + 1] = 1;
}
__global__ void read_unwritten_shared_memory(int* out) {
    out[thread()] = shared_integers()[thread()];
}

// Races

__global__ void read_without_a_barrier(int* out) {
    shared_integers()[thread()] = thread();
    out[thread()] = shared_integers()[thread() ^ 1];
}
__global__ void overwrite_without_a_barrier(int* out) {
    shared_integers()[thread()] = thread();
    __syncthreads();
    out[thread()] = shared_integers()[63 - thread()];
    shared_integers()[thread()] = 0;
}
__global__ void take_a_shuffle_for_a_barrier(int* out) {
    shared_integers()[thread()] = thread();
    const int sum = warp_sum(1);
    out[thread()] = shared_integers()[thread() ^ 1] + sum;
}
__global__ void take_a_warp_for_a_block(int* out) {
    shared_integers()[thread()] = thread();
    __syncwarp();
    out[thread()] = shared_integers()[thread() ^ 32];
}
__global__ void write_the_same_buffer(int* out) {
    out[0] = thread();
}
__global__ void write_from_two_blocks(int* out) {
    if (thread() == 0) {
        out[0] = static_cast<int>(blockIdx.x);
    }
}
__global__ void count_without_atomics(int* out) {
    if (thread() == static_cast<int>(blockIdx.x)) {
        atomicAdd(out, 1);
    } else if (thread() == 0) {
        ++*out;
    }
}
__global__ void publish_without_a_fence(int* out) {
    if (thread() == 0) {
        out[1 + blockIdx.x] = 1;
        if (atomicAdd(out, 1) == 1) {
            out[4] = out[1] + out[2];
        }
    }
}
__global__ void publish_with_a_fence(int* out) {
    if (thread() == 0) {
        out[1 + blockIdx.x] = 1;
        __threadfence();
        if (atomicAdd(out, 1) == 1) {
            out[5] = out[1] + out[2];
        }
    }
}
__global__ void take_turns(int* out) {
    if (thread() % 16 == 0) {
        while (atomicCAS(out, 0, 1) != 0) {
        }
        __threadfence();
        out[5] += 1;
        __threadfence();
        atomicExch(out, 0);
    }
}

// Copies

__global__ void read_before_the_wait(int* out) {
    if (thread() < 16) {
        copy_async_16(dynamic_shared() + thread() * 16, out + thread() * 4);
    }
    copy_async_commit();
    __syncthreads();
    out[thread()] = shared_integers()[thread()];
}
__global__ void wait_for_too_few(int* out) {
    copy_async_16(dynamic_shared() + thread() % 16 * 16 + thread() / 16 * 256, out);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    out[thread()] = shared_integers()[thread()];
}
__global__ void wait_without_a_barrier(int* out) {
    copy_async_16(dynamic_shared() + thread() * 16, out + thread() % 16 * 4);
    copy_async_commit();
    copy_async_wait<0>();
    out[thread()] = shared_integers()[(4 * thread() + 4) % 256];
}
__global__ void copy_over_what_is_read(int* out) {
    shared_integers()[thread()] = 1;
    __syncthreads();
    const int value = shared_integers()[thread() ^ 32];
    if (thread() < 16) {
        copy_async_16(dynamic_shared() + thread() * 16, out + 60);
    }
    copy_async_commit();
    if (thread() < 60) {
        out[thread()] = value;
    }
}
__global__ void copy_to_unaligned(int* out) {
    copy_async_16(dynamic_shared() + 16 * thread() + 8, out);
}
__global__ void copy_from_past_the_end(int* out) {
    copy_async_16(dynamic_shared() + 16 * thread(), out + 4 * thread());
}

// Barriers in shared memory, and what they count

std::uint64_t* shared_barrier() {
    return reinterpret_cast<std::uint64_t*>(dynamic_shared());
}
void begin(bool fenced, int arrivals = 1) {
    if (thread() == 0) {
        barrier_init(shared_barrier(), arrivals);
        if (fenced) {
            barrier_init_fence();
        }
    }
}
__global__ void use_a_barrier_before_it_is_seen(int*) {
    begin(true, 64);
    barrier_arrive(shared_barrier());
}
__global__ void copy_with_an_unfenced_barrier(int* out) {
    begin(false);
    if (thread() == 0) {
        barrier_arrive_expecting(shared_barrier(), 128);
        bulk_copy(dynamic_shared() + 128, out, 128, shared_barrier());
    }
}
__global__ void read_a_bulk_before_the_wait(int* out) {
    begin(true);
    if (thread() == 0) {
        barrier_arrive_expecting(shared_barrier(), 128);
        bulk_copy(dynamic_shared() + 128, out, 128, shared_barrier());
    }
    __syncthreads();
    out[thread()] = shared_integers()[32 + thread() % 32];
}
__global__ void expect_too_much(int* out) {
    begin(true);
    __syncthreads();
    if (thread() == 0) {
        barrier_arrive_expecting(shared_barrier(), 256);
        bulk_copy(dynamic_shared() + 128, out, 128, shared_barrier());
    }
    barrier_wait(shared_barrier(), 0);
}
// Products of a warpgroup

constexpr int kOperands = (64 + 256) * 128;
void write_operands(bool published) {
    for (int i = thread(); i < kOperands / 4; i += 128) {
        shared_integers()[i] = 0;
    }
    if (published) {
        fence_proxy_async();
    }
    __syncthreads();
}
void multiply(float (&products)[32][4]) {
    const char* shared = dynamic_shared();
    wgmma_m64n256k16_bf16(products, wgmma_operand(shared), wgmma_operand(shared + 64 * 128), false);
}
__global__ void multiply_without_a_fence(int*) {
    write_operands(true);
    float products[32][4];
    multiply(products);
}
__global__ void multiply_what_is_not_published(int*) {
    write_operands(false);
    float products[32][4];
    wgmma_fence();
    multiply(products);
}
__global__ void multiply_without_a_commit(int* out) {
    write_operands(true);
    float products[32][4];
    wgmma_fence();
    multiply(products);
    wgmma_wait<0>(products);
    if (thread() == 0) {
        out[0] = products[0][0] == 0.0F;
    }
}
__global__ void overwrite_operands(int*) {
    write_operands(true);
    float products[32][4];
    wgmma_fence();
    multiply(products);
    wgmma_commit();
    shared_integers()[thread()] = 1;
    wgmma_wait<0>(products);
}
__global__ void multiply_unaligned(int*) {
    write_operands(true);
    float products[32][4];
    wgmma_fence();
    const char* shared = dynamic_shared();
    const std::uint64_t interleaved = wgmma_operand(shared) & ~(std::uint64_t{3} << 62);
    wgmma_m64n256k16_bf16(products, interleaved, wgmma_operand(shared + 64 * 128), false);
}

// Products are NaN until they have been waited for.
__global__ void read_products_early(int* out) {
    write_operands(true);
    float products[32][4];
    wgmma_fence();
    multiply(products);
    wgmma_commit();
    const bool early = products[3][1] == 0.0F;
    wgmma_wait<0>(products);
    if (thread() < 64) {
        out[thread()] = 2 * (products[3][1] == 0.0F) + early;
    }
}

struct Case {
    const char* name;
    void (*kernel)(int*);
    unsigned blocks, threads;
    std::size_t shared_bytes;
};

#define CASE(name, ...) {#name, name, __VA_ARGS__}
const Case kCases[] = {
    CASE(part_at_a_barrier, 1, 64, 0),
    CASE(part_at_a_shuffle, 1, 64, 0),
    CASE(leave_before_a_vote, 1, 64, 0),
    CASE(shuffle_without_oneself, 1, 64, 0),
    CASE(wait_for_too_many, 1, 64, 0),
    CASE(read_past_the_end, 1, 64, 0),
    CASE(write_before_the_beginning, 1, 64, 0),
    CASE(read_unaligned, 1, 1, 0),
    CASE(index_past_an_array, 1, 64, 0),
    CASE(overflow_an_integer, 1, 64, 0),
    CASE(convert_what_is_too_large, 1, 64, 0),
    CASE(write_past_shared_memory, 1, 64, 256),
    CASE(read_unwritten_shared_memory, 1, 64, 256),
    CASE(read_without_a_barrier, 1, 64, 256),
    CASE(overwrite_without_a_barrier, 1, 64, 256),
    CASE(take_a_shuffle_for_a_barrier, 1, 64, 256),
    CASE(take_a_warp_for_a_block, 1, 64, 256),
    CASE(write_the_same_buffer, 1, 64, 0),
    CASE(write_from_two_blocks, 2, 64, 0),
    CASE(count_without_atomics, 3, 64, 0),
    CASE(publish_without_a_fence, 2, 64, 0),
    CASE(publish_with_a_fence, 2, 64, 0),
    CASE(take_turns, 2, 64, 0),
    CASE(read_before_the_wait, 1, 64, 256),
    CASE(wait_for_too_few, 1, 64, 1024),
    CASE(wait_without_a_barrier, 1, 64, 1024),
    CASE(copy_over_what_is_read, 1, 64, 256),
    CASE(copy_to_unaligned, 1, 64, 2048),
    CASE(copy_from_past_the_end, 1, 64, 1024),
    CASE(use_a_barrier_before_it_is_seen, 1, 64, 8),
    CASE(copy_with_an_unfenced_barrier, 1, 64, 256),
    CASE(read_a_bulk_before_the_wait, 1, 64, 256),
    CASE(expect_too_much, 1, 64, 256),
    CASE(multiply_without_a_fence, 1, 128, kOperands),
    CASE(multiply_what_is_not_published, 1, 128, kOperands),
    CASE(multiply_without_a_commit, 1, 128, kOperands),
    CASE(overwrite_operands, 1, 128, kOperands),
    CASE(multiply_unaligned, 1, 128, kOperands),
    CASE(read_products_early, 1, 128, kOperands),
};

// What one case says; nothing if it finds no fault.
std::string outcome(const Case& fault, bool backwards) {
    emulated_cuda::device().backwards = backwards;
    void* address = nullptr;
    cudaMalloc(&address, 64 * sizeof(int));
    cudaMemsetAsync(address, 0, 64 * sizeof(int), nullptr);
    auto* out = static_cast<int*>(address);
    std::string said;
    try {
        const Site site{fault.name, "no shapes", {0, nullptr}};
        launch(site, {fault.blocks, fault.threads, fault.shared_bytes}, fault.kernel, out);
        said = "nothing, and has " + std::to_string(out[5]);
    } catch (const std::exception& error) {
        said = error.what();
    }
    cudaFree(address);
    return said;
}

}  // namespace
}  // namespace pyfeat::cuda

int main() {
    using namespace pyfeat::cuda;
    for (const bool backwards : {false, true}) {
        for (const Case& fault : kCases) {
            std::printf("%s%s: %s\n",
                        fault.name,
                        backwards ? " backwards" : "",
                        outcome(fault, backwards).c_str());
        }
    }
}
