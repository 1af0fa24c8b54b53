// SPDX-License-Identifier: Apache-2.0
#include "cpu/blocks.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <deque>
#include <mutex>
#include <new>
#include <utility>

namespace pyfeat {
namespace {

struct Block {
    float* data = nullptr;
    std::int64_t num_bytes = 0;
};

float* allocate(std::int64_t num_bytes) {
    auto* data = static_cast<float*>(
        ::operator new(static_cast<std::size_t>(num_bytes), std::align_val_t{64}));
    prefer_huge_pages(data, num_bytes);
    return data;
}

void release(const Block& block) {
    ::operator delete(block.data, std::align_val_t{64});
}

// Blocks that are not in use, longest unused first.
class SpareBlocks {
  public:
    // Never destroyed: blocks may be given back until the process ends.
    static SpareBlocks& all() {
        static auto* const blocks = new SpareBlocks;
        return *blocks;
    }

    // The smallest block with so much room, though not more than twice as much; none: null.
    Block take(std::int64_t num_bytes) {
        // A process that was forked while another thread held the lock does without.
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock.owns_lock()) {
            return {};
        }
        auto best = blocks_.end();
        for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
            if (it->num_bytes >= num_bytes && it->num_bytes / 2 <= num_bytes &&
                (best == blocks_.end() || it->num_bytes < best->num_bytes)) {
                best = it;
            }
        }
        if (best == blocks_.end()) {
            return {};
        }
        const Block block = *best;
        blocks_.erase(best);
        num_bytes_ -= block.num_bytes;
        return block;
    }

    void give(const Block& block) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock.owns_lock() || block.num_bytes < kLeast || block.num_bytes > kMost) {
            release(block);
            return;
        }
        while (num_bytes_ + block.num_bytes > kMostInAll) {
            num_bytes_ -= blocks_.front().num_bytes;
            release(blocks_.front());
            blocks_.pop_front();
        }
        blocks_.push_back(block);
        num_bytes_ += block.num_bytes;
    }

  private:
    static constexpr std::int64_t kLeast = 16 << 10, kMost = 16 << 20, kMostInAll = 64 << 20;

    std::mutex mutex_;
    std::deque<Block> blocks_;
    std::int64_t num_bytes_ = 0;
};

// The block of ReusedFloats that is not in use.
class SpareBlock {
  public:
    static SpareBlock& only() {
        static auto* const block = new SpareBlock;
        return *block;
    }

    // With room for so much, though not more than twice as much; else null.
    Block take(std::int64_t num_bytes) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock.owns_lock() || block_.num_bytes < num_bytes || block_.num_bytes / 2 > num_bytes) {
            return {};
        }
        return std::exchange(block_, {});
    }

    void give(Block block) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (lock.owns_lock()) {
            std::swap(block, block_);
            lend_pages(block_);
        }
        if (block.data != nullptr) {
            release(block);
        }
    }

  private:
    // To the system, until they are written again.
    static void lend_pages([[maybe_unused]] const Block& block) {
#if defined(__linux__) && defined(MADV_FREE)
        constexpr std::uintptr_t kPage = 4096;
        const auto first = reinterpret_cast<std::uintptr_t>(block.data);
        const std::uintptr_t begin = (first + kPage - 1) / kPage * kPage;
        const std::uintptr_t end =
            (first + static_cast<std::uintptr_t>(block.num_bytes)) / kPage * kPage;
        if (begin < end) {
            static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_FREE));
        }
#endif
    }

    std::mutex mutex_;
    Block block_{};
};

}  // namespace

void prefer_huge_pages(void* data, std::int64_t num_bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t kHugePage = 2U << 20;
    const auto first = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
    const std::uintptr_t end =
        (first + static_cast<std::uintptr_t>(num_bytes)) / kHugePage * kHugePage;
    if (begin < end) {
        // Advice: without it everything works, with more page faults.
        static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
    }
#else
    static_cast<void>(data);
    static_cast<void>(num_bytes);
#endif
}

void AlignedFloats::reserve(std::int64_t count) {
    const auto num_bytes = std::max<std::int64_t>(count, 1) * std::int64_t{sizeof(float)};
    if (data_ != nullptr && num_bytes <= data_.get_deleter().num_bytes) {
        return;
    }
    data_.reset();
    Block block = SpareBlocks::all().take(num_bytes);
    if (block.data == nullptr) {
        block = {allocate(num_bytes), num_bytes};
    }
    data_ = {block.data, GiveBack{block.num_bytes}};
}

void AlignedFloats::GiveBack::operator()(float* block) const {
    SpareBlocks::all().give({block, num_bytes});
}

ReusedFloats::ReusedFloats(std::int64_t count) : count_(count) {
    const auto num_bytes = std::max<std::int64_t>(count, 1) * std::int64_t{sizeof(float)};
    Block block = SpareBlock::only().take(num_bytes);
    if (block.data == nullptr) {
        block = {allocate(num_bytes), num_bytes};
    }
    data_ = block.data;
    num_bytes_ = block.num_bytes;
}

ReusedFloats::~ReusedFloats() {
    SpareBlock::only().give({data_, num_bytes_});
}

void ReusedFloats::forget() {
    SpareBlock::only().give({});
}

}  // namespace pyfeat
