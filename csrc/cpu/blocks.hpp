// SPDX-License-Identifier: Apache-2.0
// Memory that kernels work in, and in what portions work is taken.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace pyfeat {

// A large block is written once and read a few times: filling it page by page costs as much as
// that.
void prefer_huge_pages(void* data, std::int64_t num_bytes);

// Floats on a 64-byte boundary, uninitialised. Blocks of 16 KB to 16 MB that are given back are
// kept for the next call, 64 MB in all: on small batches the page faults of new ones take longer
// than the products.
class AlignedFloats {
  public:
    // Room for `count` values; what was there is lost if that takes another block.
    void reserve(std::int64_t count);

    float* data() {
        return data_.get();
    }
    const float* data() const {
        return data_.get();
    }

  private:
    struct GiveBack {
        std::int64_t num_bytes;
        void operator()(float* block) const;
    };
    std::unique_ptr<float, GiveBack> data_;
};

// AlignedFloats of another type.
template <typename T>
class AlignedArray {
  public:
    // What was there may be lost.
    void make_room(std::int64_t count) {
        floats_.reserve(kFloats * count);
    }
    T* make_zeros(std::int64_t count) {
        make_room(count);
        std::fill_n(floats_.data(), kFloats * count, 0.0F);
        return data();
    }
    T* data() {
        return reinterpret_cast<T*>(floats_.data());
    }

  private:
    static constexpr auto kFloats = static_cast<std::int64_t>(sizeof(T) / sizeof(float));
    AlignedFloats floats_;
};

// Floats on a 64-byte boundary, uninitialised, for what one call keeps for another. The block that
// was given back last stays for the next one: memory that is new to the process takes as long to
// get as the products that fill it. Linux may take its pages meanwhile if it needs them.
class ReusedFloats {
  public:
    explicit ReusedFloats(std::int64_t count);
    ~ReusedFloats();
    ReusedFloats(const ReusedFloats&) = delete;
    ReusedFloats& operator=(const ReusedFloats&) = delete;

    float* data() const {
        return data_;
    }
    std::int64_t count() const {
        return count_;
    }
    // Gives up the block that stays.
    static void forget();

  private:
    std::int64_t count_, num_bytes_;
    float* data_;
};

// How much to take at a time of `total`: as even as can be, in multiples of `multiple`, none above
// `largest` unless that is less.
inline std::int64_t even_chunk(std::int64_t total, std::int64_t largest, std::int64_t multiple) {
    largest = std::max(largest / multiple * multiple, multiple);
    const std::int64_t count = std::max<std::int64_t>((total + largest - 1) / largest, 1);
    const std::int64_t chunk = (total + count - 1) / count;
    return (chunk + multiple - 1) / multiple * multiple;
}

inline std::int64_t num_chunks(std::int64_t total, std::int64_t chunk) {
    return (total + chunk - 1) / chunk;
}

}  // namespace pyfeat
