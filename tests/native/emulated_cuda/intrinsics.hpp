// SPDX-License-Identifier: Apache-2.0
// What the language adds for device code: barriers, shuffles, votes, atomics, bits and rounding.
#pragma once

#include <cstring>
#include <type_traits>

#include "emulation.hpp"
#include "vector_types.hpp"

using emulated_cuda::Here;

// Barriers

inline void __syncthreads(Here here = Here::now()) {
    emulated_cuda::block_barrier(0, 0, 0, here);
}
inline int __syncthreads_count(int predicate, Here here = Here::now()) {
    return emulated_cuda::block_barrier(0, 0, predicate != 0, here);
}
inline int __syncthreads_or(int predicate, Here here = Here::now()) {
    return emulated_cuda::block_barrier(0, 0, predicate != 0, here) != 0;
}
inline int __syncthreads_and(int predicate, Here here = Here::now()) {
    return emulated_cuda::block_barrier(0, 0, predicate == 0, here) == 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFU, Here here = Here::now()) {
    emulated_cuda::warp_barrier(mask, here);
}
inline void __threadfence() {
    emulated_cuda::fence_memory();
}
inline void __threadfence_block() {
    emulated_cuda::fence_memory();
}

// Shuffles and votes

namespace emulated_cuda {

template <typename T>
struct Shuffle {
    T value, result;
    int from;  // lane
    static void perform(std::uint32_t lanes, void* const* operands) {
        for (int lane = 0; lane < kWarp; ++lane) {
            if ((lanes >> lane & 1U) != 0) {
                auto& own = *static_cast<Shuffle*>(operands[lane]);
                const bool there = (lanes >> own.from & 1U) != 0;
                if (there) {
                    own.result = static_cast<Shuffle*>(operands[own.from])->value;
                } else {
                    std::memset(&own.result, 0xFF, sizeof(T));  // undefined
                }
            }
        }
    }
};

template <typename T>
T shuffle(unsigned mask, T value, int from, Here here) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "shuffles take 32 or 64 bits");
    Shuffle<T> own{value, value, from};
    warp_together(mask, "a shuffle", &Shuffle<T>::perform, &own, here);
    return own.result;
}

// Of a value of each lane: what all get.
template <typename T, typename Result, Result (*kCombine)(std::uint32_t, const T*)>
struct Vote {
    T value;
    Result result;

    static void perform(std::uint32_t lanes, void* const* operands) {
        T values[kWarp] = {};
        for (int lane = 0; lane < kWarp; ++lane) {
            if ((lanes >> lane & 1U) != 0) {
                values[lane] = static_cast<Vote*>(operands[lane])->value;
            }
        }
        const Result result = kCombine(lanes, values);
        for (int lane = 0; lane < kWarp; ++lane) {
            if ((lanes >> lane & 1U) != 0) {
                static_cast<Vote*>(operands[lane])->result = result;
            }
        }
    }
    static Result of(unsigned mask, T value, const char* name, Here here) {
        Vote own{value, {}};
        warp_together(mask, name, &Vote::perform, &own, here);
        return own.result;
    }
};

inline unsigned ballot_of(std::uint32_t lanes, const int* values) {
    unsigned bits = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
        bits |= ((lanes >> lane & 1U) != 0 && values[lane] != 0 ? 1U : 0U) << lane;
    }
    return bits;
}

enum class Fold { kAdd, kMin, kMax, kAnd, kOr, kXor };
template <typename T, Fold kFold>
T fold_of(std::uint32_t lanes, const T* values) {
    T result = values[__builtin_ctz(lanes)];
    for (int lane = __builtin_ctz(lanes) + 1; lane < kWarp; ++lane) {
        if ((lanes >> lane & 1U) == 0) {
            continue;
        }
        const T v = values[lane];
        if constexpr (kFold == Fold::kAdd) {
            result = static_cast<T>(result + v);
        } else if constexpr (kFold == Fold::kMin) {
            result = v < result ? v : result;
        } else if constexpr (kFold == Fold::kMax) {
            result = v > result ? v : result;
        } else if constexpr (kFold == Fold::kAnd) {
            result = result & v;
        } else if constexpr (kFold == Fold::kOr) {
            result = result | v;
        } else {
            result = result ^ v;
        }
    }
    return result;
}

}  // namespace emulated_cuda

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, Here here = Here::now()) {
    const int lane = emulated_cuda::lane();
    return emulated_cuda::shuffle(mask, value, (lane & -width) + (from & (width - 1)), here);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, Here here = Here::now()) {
    const int lane = emulated_cuda::lane(), from = lane ^ bits;
    const bool inside = from < (lane & -width) + width;
    return emulated_cuda::shuffle(mask, value, inside ? from : lane, here);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, Here here = Here::now()) {
    const int lane = emulated_cuda::lane(), from = lane - static_cast<int>(by);
    return emulated_cuda::shuffle(mask, value, from < (lane & -width) ? lane : from, here);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, Here here = Here::now()) {
    const int lane = emulated_cuda::lane(), from = lane + static_cast<int>(by);
    return emulated_cuda::shuffle(mask, value, from >= (lane & -width) + width ? lane : from, here);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Here here = Here::now()) {
    using emulated_cuda::ballot_of;
    return emulated_cuda::Vote<int, unsigned, ballot_of>::of(mask, predicate, "a ballot", here);
}
inline int __any_sync(unsigned mask, int predicate, Here here = Here::now()) {
    return __ballot_sync(mask, predicate, here) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Here here = Here::now()) {
    return __ballot_sync(mask, predicate, here) == mask;
}

#define PYFEAT_WARP_FOLD(name, fold)                                                               \
    template <typename T>                                                                          \
    T __reduce_##name##_sync(unsigned mask, T value, Here here = Here::now()) {                    \
        static_assert(std::is_integral_v<T> && sizeof(T) == 4, "reductions take 32-bit integers"); \
        using emulated_cuda::Fold;                                                                 \
        return emulated_cuda::Vote<T, T, emulated_cuda::fold_of<T, Fold::fold>>::of(               \
            mask, value, "a reduction", here);                                                     \
    }
PYFEAT_WARP_FOLD(add, kAdd)
PYFEAT_WARP_FOLD(min, kMin)
PYFEAT_WARP_FOLD(max, kMax)
PYFEAT_WARP_FOLD(and, kAnd)
PYFEAT_WARP_FOLD(or, kOr)
PYFEAT_WARP_FOLD(xor, kXor)
#undef PYFEAT_WARP_FOLD

// Atomics; what was there before is returned.

namespace emulated_cuda {

template <typename T, typename Combine>
T atomic(T* address, Combine combine, Here here) {
    check_atomic(address, sizeof(T), here);
    T before, after;
    copy_unchecked(&before, address, sizeof(T));
    after = combine(before);
    copy_unchecked(address, &after, sizeof(T));
    return before;
}

}  // namespace emulated_cuda

#define PYFEAT_ATOMIC(name, formula)                                                         \
    template <typename T>                                                                    \
    T atomic##name(T* address, std::common_type_t<T> value, Here here = Here::now()) {       \
        return emulated_cuda::atomic(                                                        \
            address, [&]([[maybe_unused]] T old) { return static_cast<T>(formula); }, here); \
    }
PYFEAT_ATOMIC(Add, old + value)
PYFEAT_ATOMIC(Sub, old - value)
PYFEAT_ATOMIC(Min, value < old ? value : old)
PYFEAT_ATOMIC(Max, old < value ? value : old)
PYFEAT_ATOMIC(Exch, value)
PYFEAT_ATOMIC(And, old& value)
PYFEAT_ATOMIC(Or, old | value)
PYFEAT_ATOMIC(Xor, old ^ value)
#undef PYFEAT_ATOMIC
// One that finds another value lets others run: it may be waiting for a lock.
template <typename T>
T atomicCAS(T* address,
            std::common_type_t<T> compare,
            std::common_type_t<T> value,
            Here here = Here::now()) {
    const T before =
        emulated_cuda::atomic(address, [&](T old) { return old == compare ? value : old; }, here);
    if (before != compare) {
        emulated_cuda::let_others_run("atomicCAS", here);
    }
    return before;
}

// Loads and stores that say how to cache

#define PYFEAT_LOAD(name)      \
    template <typename T>      \
    T name(const T* address) { \
        return *address;       \
    }
PYFEAT_LOAD(__ldg)
PYFEAT_LOAD(__ldcs)
PYFEAT_LOAD(__ldcg)
PYFEAT_LOAD(__ldca)
PYFEAT_LOAD(__ldlu)
#undef PYFEAT_LOAD
template <typename T>
void __stcs(T* address, T value) {
    *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
    *address = value;
}

// Bits

namespace emulated_cuda {
template <typename To, typename From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
}  // namespace emulated_cuda

inline int __float_as_int(float x) {
    return emulated_cuda::bits_as<int>(x);
}
inline unsigned __float_as_uint(float x) {
    return emulated_cuda::bits_as<unsigned>(x);
}
inline float __int_as_float(int x) {
    return emulated_cuda::bits_as<float>(x);
}
inline float __uint_as_float(unsigned x) {
    return emulated_cuda::bits_as<float>(x);
}
inline long long __double_as_longlong(double x) {
    return emulated_cuda::bits_as<long long>(x);
}
inline double __longlong_as_double(long long x) {
    return emulated_cuda::bits_as<double>(x);
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __clzll(long long x) {
    return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
    return __builtin_ffsll(x);
}
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) {
        reversed |= (x >> i & 1U) << (31 - i);
    }
    return reversed;
}
inline unsigned __umulhi(unsigned x, unsigned y) {
    return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32);
}
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    __extension__ using Wide = unsigned __int128;
    return static_cast<unsigned long long>(static_cast<Wide>(x) * y >> 64);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long both = static_cast<unsigned long long>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> (4 * i) & 0xFU;
        unsigned byte = static_cast<unsigned>(both >> (8 * (pick & 7U))) & 0xFFU;
        if ((pick & 8U) != 0) {
            byte = (byte & 0x80U) != 0 ? 0xFFU : 0U;
        }
        result |= byte << (8 * i);
    }
    return result;
}

#include "rounding.hpp"
