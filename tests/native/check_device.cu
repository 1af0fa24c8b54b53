// SPDX-License-Identifier: Apache-2.0
// The wrappers of csrc/cuda/device, and what kernels take from the language, against plain sums:
// emulated on a CPU, or on a GPU with nvcc. Prints "right" at the end.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/device/barrier.cuh"
#include "cuda/device/bulk_copy.cuh"
#include "cuda/device/copy_async.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/launch.hpp"
#include "cuda/similarity/panels.hpp"

namespace pyfeat::cuda {
namespace {

void require(bool condition, const char* what) {
    if (!condition) {
        std::printf("wrong: %s\n", what);
        std::exit(1);
    }
}

template <typename T>
class Buffer {
  public:
    explicit Buffer(const std::vector<T>& values) : size_(values.size()) {
        void* address = nullptr;
        require(cudaMalloc(&address, bytes()) == cudaSuccess, "allocation");
        data_ = static_cast<T*>(address);
        cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice);
    }
    ~Buffer() {
        cudaFree(data_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* get() const {
        return data_;
    }
    std::vector<T> values() const {
        std::vector<T> copied(size_);
        require(cudaDeviceSynchronize() == cudaSuccess, "a kernel that ran");
        cudaMemcpy(copied.data(), data_, bytes(), cudaMemcpyDeviceToHost);
        return copied;
    }

  private:
    std::size_t bytes() const {
        return size_ * sizeof(T);
    }
    T* data_ = nullptr;
    std::size_t size_;
};

const Site kSite{"check", "no shapes", {0, nullptr}};

float value_of(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

// Small whole numbers, whose sums of products are exact, as bfloat16.
std::vector<std::uint16_t> small_numbers(std::size_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::vector<std::uint16_t> bits(count);
    for (std::uint16_t& b : bits) {
        const auto value = static_cast<float>(static_cast<int>(generator() % 17) - 8);
        std::uint32_t wide;
        std::memcpy(&wide, &value, sizeof(wide));
        b = static_cast<std::uint16_t>(wide >> 16);
    }
    return bits;
}

// a [rows, depth] b [columns, depth]
std::vector<float> plain_products(const std::vector<std::uint16_t>& a,
                                  const std::vector<std::uint16_t>& b,
                                  int rows,
                                  int columns,
                                  int depth) {
    std::vector<float> products;
    for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < columns; ++j) {
            double sum = 0.0;
            for (int k = 0; k < depth; ++k) {
                sum += static_cast<double>(value_of(a[static_cast<std::size_t>(i * depth + k)])) *
                       value_of(b[static_cast<std::size_t>(j * depth + k)]);
            }
            products.push_back(static_cast<float>(sum));
        }
    }
    return products;
}

// One warp: a [16, 16], b [8, 16], products [16, 8]; operands come through shared memory.
__global__ void multiply_mma(const std::uint16_t* a, const std::uint16_t* b, float* products) {
    char* shared = dynamic_shared();
    const int lane = static_cast<int>(threadIdx.x);
    copy_async_16(shared + lane * 16, a + lane * 8);
    if (lane < 16) {
        copy_async_16(shared + 512 + lane * 16, b + lane * 8);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    std::uint32_t rows[4], columns[4];
    ldmatrix_x4(rows, shared + lane % 16 * 32 + lane / 16 * 16);
    ldmatrix_x4(columns, shared + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
    const std::uint32_t pair[2] = {columns[0], columns[1]};
    float sums[4] = {1.0F, 1.0F, 1.0F, 1.0F};
    mma_m16n8k16_bf16(sums, rows, pair);
    for (int e = 0; e < 4; ++e) {
        products[(lane / 4 + 8 * (e / 2)) * 8 + 2 * (lane % 4) + e % 2] = sums[e] - 1.0F;
    }
}

void check_mma() {
    const auto a = small_numbers(16 * 16, 1), b = small_numbers(8 * 16, 2);
    const Buffer<std::uint16_t> on_a(a), on_b(b);
    const Buffer<float> products(std::vector<float>(16 * 8));
    launch(kSite, {1, 32, 768}, multiply_mma, on_a.get(), on_b.get(), products.get());
    require(products.values() == plain_products(a, b, 16, 8, 16), "mma of bfloat16");
}

// A warpgroup and a warp that copies: a [64, 64] and b [256, 64] in packed form, twice over, in two
// stages; products [64, 256].
__global__ void multiply_wgmma(const std::uint16_t* a, const std::uint16_t* b, float* products) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PYFEAT_EMULATED_CUDA)
    constexpr int kBytesOfA = 64 * kLineBytes, kBytesOfB = 256 * kLineBytes;
    constexpr int kStage = kBytesOfA + kBytesOfB;
    char* shared = dynamic_shared();
    auto* full = reinterpret_cast<std::uint64_t*>(shared);
    auto* empty = full + 2;
    char* stages = shared + 1024;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 128);
        }
        barrier_init_fence();
    }
    __syncthreads();
    constexpr int kRounds = 4;
    if (threadIdx.x >= 128) {
        for (int round = 0; threadIdx.x == 128 && round < kRounds; ++round) {
            char* stage = stages + round % 2 * kStage;
            barrier_wait(empty + round % 2, (round / 2 + 1) % 2);
            barrier_arrive_expecting(full + round % 2, kStage);
            bulk_copy(stage, a, kBytesOfA, full + round % 2);
            bulk_copy(stage + kBytesOfA, b, kBytesOfB, full + round % 2);
        }
        return;
    }
    float sums[32][4];
    for (int round = 0; round < kRounds; ++round) {
        const char* stage = stages + round % 2 * kStage;
        barrier_wait(full + round % 2, round / 2 % 2);
        wgmma_fence();
        for (int step = 0; step < 4; ++step) {
            wgmma_m64n256k16_bf16(sums,
                                  wgmma_operand(stage + 32 * step),
                                  wgmma_operand(stage + kBytesOfA + 32 * step),
                                  round > 0 || step > 0);
        }
        wgmma_commit();
        wgmma_wait<0>(sums);
        barrier_arrive(empty + round % 2);
    }
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int j = 0; j < 32; ++j) {
        for (int e = 0; e < 4; ++e) {
            const int row = 16 * warp + lane / 4 + 8 * (e / 2);
            products[row * 256 + 8 * j + 2 * (lane % 4) + e % 2] = sums[j][e] / kRounds;
        }
    }
#endif
}

// As panels.hpp packs one block of columns, for any number of rows.
std::vector<std::uint16_t> packed_lines(const std::vector<std::uint16_t>& rows, int count) {
    std::vector<std::uint16_t> packed(rows.size());
    for (int r = 0; r < count; ++r) {
        for (int c = 0; c < kBlockColumns; ++c) {
            const int at = swizzled_piece(r, c / kPieceColumns) / 2 + c % kPieceColumns;
            packed[static_cast<std::size_t>(at)] =
                rows[static_cast<std::size_t>(r * kBlockColumns + c)];
        }
    }
    return packed;
}

void check_wgmma() {
    if (capability(kSite) != 90) {
        std::printf("no wgmma here\n");
        return;
    }
    const auto a = small_numbers(64 * 64, 3), b = small_numbers(256 * 64, 4);
    const Buffer<std::uint16_t> on_a(packed_lines(a, 64)), on_b(packed_lines(b, 256));
    const Buffer<float> products(std::vector<float>(64 * 256));
    const std::size_t bytes = 1024 + 2 * (64 + 256) * kLineBytes;
    launch(kSite, {1, 160, bytes}, multiply_wgmma, on_a.get(), on_b.get(), products.get());
    require(products.values() == plain_products(a, b, 64, 256, 64), "wgmma of bfloat16");
}

// 64 threads a block in two dimensions: what shuffles, votes, reductions and barriers give.
__global__ void combine(float* sums, int* votes) {
    auto* shared = reinterpret_cast<float*>(dynamic_shared());
    const int index = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    const int lane = index % 32, thread = static_cast<int>(blockIdx.x) * 64 + index;
    const auto value = static_cast<float>(thread);
    shared[index] = warp_sum(value);
    __syncthreads();
    sums[thread] = shared[63 - index] + warp_max(value);
    int* own = votes + 8 * thread;
    own[0] = __shfl_sync(kWholeWarp, thread, 5, 8);
    own[1] = __shfl_up_sync(kWholeWarp, thread, 3, 16);
    own[2] = __shfl_down_sync(kWholeWarp, thread, 3, 16);
    own[3] = static_cast<int>(__ballot_sync(kWholeWarp, lane % 3 == 0));
    own[4] = __any_sync(kWholeWarp, lane == 40) + 2 * __all_sync(kWholeWarp, lane < 32);
    own[5] = __reduce_max_sync(kWholeWarp, lane ^ 21) + __reduce_add_sync(kWholeWarp, 1);
    own[6] = __syncthreads_count(index % 5 == 0) + 100 * __syncthreads_or(index == 64);
    if (lane < 16) {
        own[7] = __shfl_xor_sync(0xFFFFU, thread, 9);
    } else {
        own[7] = __shfl_xor_sync(0xFFFF0000U, thread, 9);
    }
}

void check_warps() {
    const Buffer<float> sums(std::vector<float>(192));
    const Buffer<int> votes(std::vector<int>(8 * 192));
    launch(kSite, {3, dim3(16, 4), 256}, combine, sums.get(), votes.get());
    const auto got = votes.values();
    const auto got_sums = sums.values();
    for (int thread = 0; thread < 192; ++thread) {
        const int lane = thread % 32, first = thread - lane;
        const int other = thread / 64 * 64 + 63 - thread % 64;
        const auto opposite = static_cast<float>(32 * (other / 32 * 32) + 496);
        const int own[8] = {
            first + lane / 8 * 8 + 5,
            lane % 16 < 3 ? thread : thread - 3,
            lane % 16 > 12 ? thread : thread + 3,
            0x49249249,
            2,
            31 + 32,
            13,
            first + (lane ^ 9),
        };
        for (int i = 0; i < 8; ++i) {
            require(got[static_cast<std::size_t>(8 * thread + i)] == own[i], "shuffles and votes");
        }
        require(
            got_sums[static_cast<std::size_t>(thread)] == opposite + static_cast<float>(first + 31),
            "reductions of a warp");
    }
}

// Two named barriers of 64 threads, each handing over within its half.
__global__ void exchange(int* values) {
    auto* shared = reinterpret_cast<int*>(dynamic_shared());
    const int index = static_cast<int>(threadIdx.x);
    shared[index] = index * index;
    if (index < 64) {
        named_barrier_sync<1, 64>();
    } else {
        named_barrier_sync<2, 64>();
    }
    values[index] = shared[index ^ 63];
}

void check_named_barriers() {
    const Buffer<int> values(std::vector<int>(128));
    launch(kSite, {1, 128, 512}, exchange, values.get());
    for (int i = 0; i < 128; ++i) {
        require(values.values()[static_cast<std::size_t>(i)] == (i ^ 63) * (i ^ 63),
                "named barriers");
    }
}

// All blocks add; the last one to come, who has seen the others, doubles.
__global__ void add_up(unsigned long long* sums, unsigned* count, float* parts) {
    const int index = static_cast<int>(threadIdx.x);
    auto* is_last = reinterpret_cast<int*>(dynamic_shared());
    atomicAdd(sums, 1ULL + threadIdx.x);
    atomicMax(sums + 1, 100ULL * blockIdx.x + threadIdx.x);
    parts[blockIdx.x * 32 + threadIdx.x] = static_cast<float>(index);
    __threadfence();
    __syncthreads();
    if (index == 0) {
        *is_last = atomicAdd(count, 1U) == gridDim.x - 1;
    }
    __syncthreads();
    if (*is_last != 0) {
        __threadfence();
        for (unsigned block = 0; block < gridDim.x; ++block) {
            parts[block * 32 + threadIdx.x] *= 2.0F;
        }
    }
}

void check_atomics() {
    const Buffer<unsigned long long> sums({0, 0});
    const Buffer<unsigned> count({0});
    const Buffer<float> parts(std::vector<float>(5 * 32));
    launch(kSite, {5, 32, 16}, add_up, sums.get(), count.get(), parts.get());
    require(sums.values() == std::vector<unsigned long long>{5 * 528, 431}, "atomics");
    const auto doubled = parts.values();
    for (std::size_t i = 0; i < doubled.size(); ++i) {
        require(doubled[i] == static_cast<float>(2 * (i % 32)), "the last block");
    }
}

__global__ void convert(const double* x, double* y) {
    const double v = *x;
    const auto f = static_cast<float>(v);
    y[0] = __double2float_rd(v);
    y[1] = __double2float_ru(v);
    y[2] = __double2float_rz(-v);
    y[3] = __dadd_ru(v, 1e-30);
    y[4] = __fmul_rd(f, f);
    y[5] = __fmaf_rn(f, f, -__fmul_rn(f, f));
    y[6] = __float2int_rn(2.5F) + 10 * __float2int_rd(-2.5F);
    y[7] = static_cast<double>(__float2ll_rz(1e30F));
    y[8] = __clz(1) + __popc(0xFFU) + __ffs(8) + __clzll(1);
    y[9] =
        __brev(1U) == 0x80000000U && __byte_perm(0x33221100U, 0x77665544U, 0x7410U) == 0x77441100U;
    y[10] = __longlong_as_double(__double_as_longlong(v)) + __uint_as_float(__float_as_uint(f));
}

void check_conversions() {
    const double v = 1.0 / 3.0;
    const auto below = 0x1.555554p-2F, above = 0x1.555556p-2F;
    const Buffer<double> x({v}), y(std::vector<double>(11));
    launch(kSite, {1, 1}, convert, x.get(), y.get());
    const auto got = y.values();
    const double square = static_cast<double>(above) * above;
    require(got[0] == below && got[1] == above && got[2] == -below, "rounded conversions");
    require(got[3] == std::nextafter(v, 1.0), "sums rounded up");
    require(got[4] <= square && got[4] >= square - 1e-8, "products rounded down");
    require(got[5] == square - static_cast<double>(above * above), "fused multiply-add");
    require(got[6] == 2.0 - 30.0 && got[7] == static_cast<double>(0x7FFFFFFFFFFFFFFFLL),
            "conversions to integers");
    require(got[8] == 31 + 8 + 4 + 63 && got[9] == 1.0 && got[10] == v + above, "bits");
}

}  // namespace
}  // namespace pyfeat::cuda

int main() {
    using namespace pyfeat::cuda;
    check_mma();
    check_wgmma();
    check_warps();
    check_named_barriers();
    check_atomics();
    check_conversions();
    std::printf("right\n");
}
