// SPDX-License-Identifier: Apache-2.0
// The instructions of Intel AMX that the kernels use, in plain C++, as the manual defines them: for
// processors that lack them, and to compare with those that have them.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulated_amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct State {
    bool configured = false;
    int rows[kTiles], row_bytes[kTiles];
    unsigned char tiles[kTiles][kRows][kRowBytes];
};
inline thread_local State state;

// What a processor refuses with an exception ends the program.
inline void require(bool condition) {
    if (!condition) {
        __builtin_trap();
    }
}

inline void configure(const void* configuration) {
    const auto* bytes = static_cast<const unsigned char*>(configuration);
    require(bytes[0] == 1 && bytes[1] == 0);
    for (int t = 0; t < kTiles; ++t) {
        std::uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * t, sizeof(row_bytes));
        state.row_bytes[t] = row_bytes;
        state.rows[t] = bytes[48 + t];
        require(state.rows[t] <= kRows && row_bytes <= kRowBytes);
    }
    std::memset(state.tiles, 0, sizeof(state.tiles));
    state.configured = true;
}

inline void release() {
    state.configured = false;
}

inline void zero(int tile) {
    require(state.configured);
    std::memset(state.tiles[tile], 0, sizeof(state.tiles[tile]));
}

inline void load(int tile, const void* base, long stride) {
    require(state.configured);
    for (int r = 0; r < state.rows[tile]; ++r) {
        std::memcpy(state.tiles[tile][r],
                    static_cast<const char*>(base) + r * stride,
                    static_cast<std::size_t>(state.row_bytes[tile]));
    }
}

inline void store(int tile, void* base, long stride) {
    require(state.configured);
    for (int r = 0; r < state.rows[tile]; ++r) {
        std::memcpy(static_cast<char*>(base) + r * stride,
                    state.tiles[tile][r],
                    static_cast<std::size_t>(state.row_bytes[tile]));
    }
}

// Subnormal numbers count as zero, as input and as result.
inline float flushed(float value) {
    return value > -0x1p-126F && value < 0x1p-126F ? value * 0.0F : value;
}

inline float widened(const unsigned char* bfloat16) {
    std::uint16_t half;
    std::memcpy(&half, bfloat16, sizeof(half));
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return flushed(value);
}

inline void multiply_bfloat16(int sum, int a, int b) {
    require(state.configured);
    for (int m = 0; m < state.rows[sum]; ++m) {
        for (int n = 0; n < state.row_bytes[sum] / 4; ++n) {
            float even = 0.0F, odd = 0.0F;
            for (int k = 0; k < state.row_bytes[a] / 4; ++k) {
                const unsigned char* left = state.tiles[a][m] + 4 * k;
                const unsigned char* right = state.tiles[b][k] + 4 * n;
                even = flushed(__builtin_fmaf(widened(left), widened(right), even));
                odd = flushed(__builtin_fmaf(widened(left + 2), widened(right + 2), odd));
            }
            float total;
            std::memcpy(&total, state.tiles[sum][m] + 4 * n, sizeof(total));
            total = flushed(flushed(total) + flushed(even + odd));
            std::memcpy(state.tiles[sum][m] + 4 * n, &total, sizeof(total));
        }
    }
}

inline void multiply_signed_bytes(int sum, int a, int b) {
    require(state.configured);
    for (int m = 0; m < state.rows[sum]; ++m) {
        for (int n = 0; n < state.row_bytes[sum] / 4; ++n) {
            std::int32_t total;
            std::memcpy(&total, state.tiles[sum][m] + 4 * n, sizeof(total));
            for (int k = 0; k < state.row_bytes[a] / 4; ++k) {
                for (int i = 0; i < 4; ++i) {
                    total += static_cast<signed char>(state.tiles[a][m][4 * k + i]) *
                             static_cast<signed char>(state.tiles[b][k][4 * n + i]);
                }
            }
            std::memcpy(state.tiles[sum][m] + 4 * n, &total, sizeof(total));
        }
    }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(configuration) emulated_amx::configure(configuration)
#define _tile_release() emulated_amx::release()
#define _tile_zero(tile) emulated_amx::zero(tile)
#define _tile_loadd(tile, base, stride) emulated_amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_amx::store(tile, base, stride)
#define _tile_dpbf16ps(sum, a, b) emulated_amx::multiply_bfloat16(sum, a, b)
#define _tile_dpbssd(sum, a, b) emulated_amx::multiply_signed_bytes(sum, a, b)
