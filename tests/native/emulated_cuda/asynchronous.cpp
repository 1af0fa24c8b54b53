// SPDX-License-Identifier: Apache-2.0
// What goes on while a thread does something else: copies, barriers that count them, and products
// of warpgroups.
#include <cmath>
#include <cstring>
#include <limits>

#include "state.hpp"

namespace emulated_cuda {
namespace {

Barrier& barrier_at(std::uint64_t* address, Here here) {
    Block& b = block();
    const std::uint32_t offset = shared_offset(address, here);
    check_read(address, sizeof(std::uint64_t), here);  // made, and seen to be
    const auto found = b.barriers.find(offset);
    if (found == b.barriers.end()) {
        fail(here, "a barrier in shared memory that nobody has made");
    }
    return found->second;
}

void complete_if_all_came(Barrier& barrier) {
    if (barrier.missing > 0) {
        return;
    }
    for (const Barrier::Bulk& bulk : barrier.copies) {
        const Epoch epoch =
            static_cast<Epoch>(bulk.thread) << 22 | kAsynchronous | (bulk.count & kCount);
        land(bulk.copy, epoch);
        barrier.missing_bytes -= static_cast<std::int64_t>(bulk.copy.bytes);
        std::uint32_t& seen = barrier.pending[static_cast<std::size_t>(bulk.thread)];
        seen = seen < bulk.count ? bulk.count : seen;
    }
    barrier.copies.clear();
    if (barrier.missing_bytes == 0) {
        join(barrier.completed, barrier.pending);
        barrier.missing = barrier.arrivals;
        ++barrier.phase;
        ++block().progress;
    }
}

// Of the piece of 16 bytes at a line and a 16-byte column from where a descriptor points to, with
// lines of 128 bytes in groups of 8 and swizzled pieces: its offset in shared memory.
std::size_t swizzled_offset(std::uint64_t descriptor, int line, int piece) {
    const std::size_t start = (descriptor & 0x3FFFU) << 4;
    const std::size_t group_bytes = (descriptor >> 32 & 0x3FFFU) << 4;
    const std::size_t linear = start + static_cast<std::size_t>(line / 8) * group_bytes +
                               static_cast<std::size_t>(line % 8 * 128 + piece * 16);
    return linear ^ (linear >> 7 & 7U) << 4;  // bits 4-6 by bits 7-9 of the address
}

// [lines, 16] of an operand, as the asynchronous proxy sees it.
std::vector<float> read_operand(std::uint64_t descriptor, int lines, Here here) {
    constexpr std::uint64_t kSwizzle128 = 1;
    Block& b = block();
    const Thread& thread = *b.current;
    if (descriptor >> 62 != kSwizzle128 || (descriptor >> 49 & 7U) != 0) {
        fail(here, "a descriptor that is not one of 128-byte swizzle at a multiple of 1024 bytes");
    }
    std::vector<float> values(static_cast<std::size_t>(lines) * 16);
    for (int line = 0; line < lines; ++line) {
        for (int piece = 0; piece < 2; ++piece) {
            const std::size_t offset = swizzled_offset(descriptor, line, piece);
            check_read(b.shared + offset, 16, here);
            for (std::size_t i = offset; i < offset + 16; ++i) {
                const Epoch epoch = b.written[i];
                const auto writer = static_cast<std::size_t>(thread_of(epoch));
                const std::uint32_t count = epoch & kCount;
                const Thread& wrote = *b.threads[writer];
                const bool published =
                    (epoch & kAsynchronous) != 0 || count <= thread.fenced[writer] ||
                    (count < wrote.fence_count && wrote.fence_count <= thread.clock[writer]);
                if (!published) {
                    fail(here, "products of shared byte %zu, which no proxy fence published", i);
                }
            }
            for (int e = 0; e < 8; ++e) {
                std::uint16_t bits;
                std::memcpy(&bits, b.shared + offset + 2 * e, sizeof(bits));
                values[static_cast<std::size_t>(line * 16 + piece * 8 + e)] = from_bf16(bits);
            }
        }
    }
    return values;
}

std::vector<Product>& products_of_warpgroup() {
    return block().products[static_cast<std::size_t>(block().current->index / 128)];
}

void multiply(const Product& product, int index, std::vector<float>& values) {
    for (int j = 0; j < product.columns / 8; ++j) {
        for (int e = 0; e < 4; ++e) {
            const int row = index / 32 * 16 + index % 32 / 4 + 8 * (e / 2);
            const int column = 8 * j + 2 * (index % 4) + e % 2;
            float& value = values[static_cast<std::size_t>(4 * j + e)];
            double sum = product.accumulate ? value : 0.0;
            const float* a = product.a_values.data() + row * 16;
            const float* b = product.b_values.data() + column * 16;
            for (int k = 0; k < 16; ++k) {
                sum += static_cast<double>(a[k]) * b[k];
            }
            value = toward_zero(sum);
        }
    }
}

}  // namespace

float toward_zero(double sum) {
    const auto nearest = static_cast<float>(sum);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) && std::isfinite(sum)
               ? std::nextafterf(nearest, 0.0F)
               : nearest;
}

void copy_async(void* shared, const void* global, int bytes, int source_bytes, Here here) {
    const Copy copy{shared_offset(shared, here),
                    global,
                    static_cast<std::size_t>(bytes),
                    static_cast<std::size_t>(source_bytes)};
    if (copy.offset % copy.bytes != 0 ||
        reinterpret_cast<std::uintptr_t>(global) % copy.bytes != 0) {
        fail(here, "a copy of %d bytes from or to an address that is no multiple of it", bytes);
    }
    take_off(copy, here);
    block().current->copies.push_back(copy);
}

void copy_async_commit() {
    Thread& thread = *block().current;
    thread.copy_groups.push_back(std::move(thread.copies));
    thread.copies.clear();
}

void copy_async_wait(int pending, Here) {
    Thread& thread = *block().current;
    while (thread.copy_groups.size() > static_cast<std::size_t>(pending)) {
        for (const Copy& copy : thread.copy_groups.front()) {
            land(copy, thread.epoch());
        }
        thread.copy_groups.erase(thread.copy_groups.begin());
    }
}

void barrier_init(std::uint64_t* address, int arrivals, Here here) {
    Block& b = block();
    const std::uint32_t offset = shared_offset(address, here);
    check_write(address, sizeof(std::uint64_t), here);
    if (arrivals < 1 || offset % sizeof(std::uint64_t) != 0) {
        fail(here, "a barrier for %d threads at byte %u of shared memory", arrivals, offset);
    }
    Barrier& barrier = b.barriers[offset] = Barrier{};
    barrier.arrivals = barrier.missing = arrivals;
    barrier.maker = b.current->index;
    barrier.pending.assign(static_cast<std::size_t>(b.num_threads), 0);
    barrier.completed = barrier.pending;
}

void fence_barrier_init() {
    for (auto& [offset, barrier] : block().barriers) {
        barrier.fenced |= barrier.maker == block().current->index;
    }
}

void barrier_arrive(std::uint64_t* address, int expected_bytes, Here here) {
    Thread& thread = *block().current;
    Barrier& barrier = barrier_at(address, here);
    if (barrier.missing == 0) {
        fail(here, "more threads arrive at a barrier than its %d", barrier.arrivals);
    }
    join(barrier.pending, thread.clock);
    thread.publish();
    --barrier.missing;
    barrier.missing_bytes += expected_bytes;
    ++block().progress;
    if (barrier.copies.empty()) {  // copies arrive when somebody waits for them
        complete_if_all_came(barrier);
    }
}

void barrier_wait(std::uint64_t* address, int parity, Here here) {
    Barrier& barrier = barrier_at(address, here);
    for (;;) {
        if (barrier.phase % 2 == parity) {
            complete_if_all_came(barrier);
        }
        if (barrier.phase % 2 != parity) {
            join(block().current->clock, barrier.completed);
            return;
        }
        pause("a barrier in shared memory", here);
    }
}

void bulk_copy(void* shared, const void* global, int bytes, std::uint64_t* address, Here here) {
    Thread& thread = *block().current;
    Barrier& barrier = barrier_at(address, here);
    const Copy copy{shared_offset(shared, here),
                    global,
                    static_cast<std::size_t>(bytes),
                    static_cast<std::size_t>(bytes)};
    if (!barrier.fenced) {
        fail(here, "a copy counted by a barrier that its maker has not fenced");
    }
    if (copy.offset % 16 != 0 || bytes <= 0 || bytes % 16 != 0 ||
        reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
        fail(here, "a copy of %d bytes, or at addresses, that are no multiples of 16", bytes);
    }
    take_off(copy, here);
    const auto own = static_cast<std::size_t>(thread.index);
    barrier.copies.push_back({copy, thread.index, thread.clock[own]});
    thread.publish();
    ++block().progress;
}

void fence_proxy_async() {
    Thread& thread = *block().current;
    thread.publish();
    thread.fenced = thread.clock;
    thread.fence_count = thread.clock[static_cast<std::size_t>(thread.index)];
}

void warpgroup_fence(Here) {
    block().current->warpgroup_fenced = true;
}

void warpgroup_multiply(
    float* registers, int columns, std::uint64_t a, std::uint64_t b, bool accumulate, Here here) {
    Thread& thread = *block().current;
    if (!thread.warpgroup_fenced) {
        fail(here, "products of a warpgroup without a fence before");
    }
    std::vector<Product>& products = products_of_warpgroup();
    const auto index = static_cast<std::size_t>(thread.multiplied++);
    if (index == products.size()) {
        products.push_back({columns, a, b, accumulate, 128, {}, {}});
        // What is there must stay until the wait.
        read_operand(a, 64, here);
        read_operand(b, columns, here);
    }
    const Product& product = products[index];
    if (product.columns != columns || product.a != a || product.b != b ||
        product.accumulate != accumulate) {
        fail(here, "threads of a warpgroup that ask for different products");
    }
    const auto count = static_cast<std::size_t>(columns / 2);
    if (thread.products.count(registers) == 0) {
        thread.products[registers] = std::vector<float>(registers, registers + count);
    }
    std::fill_n(registers, count, std::numeric_limits<float>::quiet_NaN());
}

void warpgroup_commit(Here) {
    Thread& thread = *block().current;
    thread.product_groups.push_back(thread.multiplied);
}

void warpgroup_wait(int pending, Here here) {
    Thread& thread = *block().current;
    thread.warpgroup_fenced = false;
    std::vector<int>& groups = thread.product_groups;
    if (groups.size() <= static_cast<std::size_t>(pending)) {
        return;
    }
    const int end = groups[groups.size() - 1 - static_cast<std::size_t>(pending)];
    groups.erase(groups.begin(), groups.end() - pending);
    if (thread.products.size() > 1) {
        fail(here, "products into two sets of registers at a time, which are not emulated");
    }
    for (; thread.waited < end; ++thread.waited) {
        Product& product = products_of_warpgroup()[static_cast<std::size_t>(thread.waited)];
        if (product.a_values.empty()) {
            product.a_values = read_operand(product.a, 64, here);
            product.b_values = read_operand(product.b, product.columns, here);
        }
        multiply(product, thread.index % 128, thread.products.begin()->second);
        if (--product.threads_left == 0) {
            product.a_values = product.b_values = {};
        }
    }
    if (thread.waited == thread.multiplied && !thread.products.empty()) {
        const auto& [registers, values] = *thread.products.begin();
        std::memcpy(registers, values.data(), values.size() * sizeof(float));
        thread.products.clear();
    }
}

}  // namespace emulated_cuda
