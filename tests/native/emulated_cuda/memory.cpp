// SPDX-License-Identifier: Apache-2.0
// Which bytes a kernel may touch, and whether threads race for them.
#include "memory.hpp"

#include <link.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <unordered_map>

namespace emulated_cuda {
namespace {

bool is_read(Access access) {
    return access == Access::kRead || access == Access::kAtomicRead;
}
bool is_atomic(Access access) {
    return access == Access::kAtomic || access == Access::kAtomicRead;
}

// Of a byte of a buffer: block << 32 | epoch, 0 for none.
struct Cell {
    std::uint64_t written, read_first, read_last;
};
constexpr std::uintptr_t kPage = 1024;

struct Range {
    std::uintptr_t first, end;
};

std::map<std::uintptr_t, std::uintptr_t> buffers;  // first, end
Range latest{0, 0}, arguments_range{0, 0}, module_range{0, 0};
std::unordered_map<std::uintptr_t, std::vector<Cell>> cells;  // of this launch, by page

// What a thread that uses an atomic sees of those that used it before.
struct Released {
    std::set<std::int64_t> blocks;
    std::int64_t block = 0;  // whose threads have this clock
    Clock clock;
};
std::map<std::uintptr_t, Released> released;  // by address of the atomic

Cell* page_of(std::uintptr_t address) {
    static std::uintptr_t latest_page = 0;
    static Cell* latest_cells = nullptr;
    if (latest_page != address / kPage || cells.empty()) {
        std::vector<Cell>& page = cells[address / kPage];
        if (page.empty()) {
            page.resize(kPage);
        }
        latest_page = address / kPage;
        latest_cells = page.data();
    }
    return latest_cells;
}

void find_module() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* range) {
            const auto own = reinterpret_cast<std::uintptr_t>(&buffers);
            Range found{~std::uintptr_t{0}, 0};
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type == PT_LOAD) {
                    const std::uintptr_t first = info->dlpi_addr + header.p_vaddr;
                    found.first = std::min(found.first, first);
                    found.end = std::max(found.end, first + header.p_memsz);
                }
            }
            if (own < found.first || own >= found.end) {
                return 0;
            }
            *static_cast<Range*>(range) = found;
            return 1;
        },
        &module_range);
}

bool is_inside(const Range& range, std::uintptr_t address, std::size_t bytes) {
    return address >= range.first && address + bytes <= range.end;
}

[[noreturn]] void fail_race(
    Access access, const char* space, std::size_t at, int other, Here here) {
    fail(here,
         "a %s of %s byte %zu races with thread %d of the block",
         name_of(access),
         space,
         at,
         other);
}

// Reads of two threads that have not seen each other are both remembered; of more, the first and
// the last.
template <typename E, typename Seen>
void remember_read(E& first, E& last, E own, const Seen& seen) {
    if (first == 0 || seen(first)) {
        first = own;
    } else {
        last = own;
    }
}

// Whether the access conflicts with what is remembered; the epoch that it conflicts with, or 0.
template <typename E, typename Seen>
E conflict(Access access, E written, E read_first, E read_last, const Seen& seen) {
    const auto is_free = [&](E epoch) {
        return epoch == 0 || seen(epoch) || (is_atomic(access) && (epoch & kAtomic) != 0);
    };
    if (!is_free(written)) {
        return written;
    }
    if (is_read(access) || is_free(read_first)) {
        return is_read(access) || is_free(read_last) ? 0 : read_last;
    }
    return read_first;
}

void check_shared(std::size_t offset, std::size_t bytes, Access access, Here here) {
    Block& b = block();
    const Thread& thread = *b.current;
    if (offset + bytes > b.shared_bytes) {
        fail(here,
             "a %s of %zu bytes at %zu of %zu bytes of shared memory",
             name_of(access),
             bytes,
             offset,
             b.shared_bytes);
    }
    const auto seen = [&](Epoch epoch) { return thread.has_seen(epoch); };
    const Epoch own = thread.epoch() | (is_atomic(access) ? kAtomic : 0);
    for (std::size_t i = offset; i < offset + bytes; ++i) {
        Epoch& written = b.written[i];
        if (written == kInFlight) {
            fail(here, "a %s of shared byte %zu, whose copy is on its way", name_of(access), i);
        }
        if (written == 0 && access != Access::kWrite) {
            fail(here, "a %s of shared byte %zu, which nobody has written", name_of(access), i);
        }
        const Epoch other = conflict(access, written, b.read_first[i], b.read_last[i], seen);
        if (other != 0) {
            fail_race(access, "shared", i, thread_of(other), here);
        }
        if (is_read(access)) {
            remember_read(b.read_first[i], b.read_last[i], own, seen);
        } else {
            written = own;
            b.read_first[i] = b.read_last[i] = 0;
        }
    }
}

void check_buffer(std::uintptr_t address, std::size_t bytes, Access access, Here here) {
    Block& b = block();
    const Thread& thread = *b.current;
    const auto seen = [&](std::uint64_t epoch) {
        const auto other = static_cast<std::int64_t>(epoch >> 32);
        return other == b.ordinal ? thread.has_seen(static_cast<Epoch>(epoch))
                                  : b.acquired.count(other) != 0;
    };
    const std::uint64_t own = static_cast<std::uint64_t>(b.ordinal) << 32 | thread.epoch() |
                              (is_atomic(access) ? kAtomic : 0);
    Cell* page = nullptr;
    for (std::uintptr_t at = address; at < address + bytes; ++at) {
        if (page == nullptr || at % kPage == 0) {
            page = page_of(at);
        }
        Cell& cell = page[at % kPage];
        const std::uint64_t other =
            conflict(access, cell.written, cell.read_first, cell.read_last, seen);
        if (other != 0) {
            const auto block_of = static_cast<long long>(other >> 32);
            if (block_of == b.ordinal) {
                fail_race(access, "global", at - latest.first, thread_of(Epoch(other)), here);
            }
            fail(here,
                 "a %s of global byte %zu races with block %lld of the grid",
                 name_of(access),
                 static_cast<std::size_t>(at - latest.first),
                 block_of - 1);
        }
        if (is_read(access)) {
            remember_read(cell.read_first, cell.read_last, own, seen);
        } else {
            cell.written = own;
            cell.read_first = cell.read_last = 0;
        }
    }
}

}  // namespace

const char* name_of(Access access) {
    return is_read(access) ? "read" : (access == Access::kWrite ? "write" : "atomic");
}

void check(std::uintptr_t address, std::size_t bytes, Access access, Here here) {
    Block& b = block();
    const std::size_t offset = address - reinterpret_cast<std::uintptr_t>(b.shared);
    if (offset < kSharedWindow) {
        check_shared(offset, bytes, access, here);
        return;
    }
    if (b.current->fiber.holds(address)) {
        return;
    }
    if (!is_inside(latest, address, bytes)) {
        if (is_inside(arguments_range, address, bytes) ||
            (is_read(access) && is_inside(module_range, address, bytes))) {
            return;
        }
        const auto after = buffers.upper_bound(address);
        const auto found = after == buffers.begin() ? buffers.end() : std::prev(after);
        if (found == buffers.end() || address + bytes > found->second) {
            const long long past =
                found == buffers.end() ? 0 : static_cast<long long>(address - found->second);
            fail(here,
                 "a %s of %zu bytes outside of all buffers, %lld bytes past the end of one",
                 name_of(access),
                 bytes,
                 past);
        }
        latest = {found->first, found->second};
    }
    check_buffer(address, bytes, access, here);
}

void allow(const void* address, std::size_t bytes) {
    if (bytes == 0) {
        return;
    }
    // One range for all that overlap: a view of a buffer, or one where another was freed.
    auto first = reinterpret_cast<std::uintptr_t>(address);
    std::uintptr_t end = first + bytes;
    auto found = buffers.upper_bound(first);
    if (found != buffers.begin() && std::prev(found)->second > first) {
        --found;
    }
    while (found != buffers.end() && found->first < end) {
        first = std::min(first, found->first);
        end = std::max(end, found->second);
        found = buffers.erase(found);
    }
    buffers[first] = end;
}

void forget(const void* address) {
    buffers.erase(reinterpret_cast<std::uintptr_t>(address));
}

void forget_all() {
    buffers.clear();
}

void begin_grid(const void* arguments, std::size_t argument_bytes) {
    const auto first = reinterpret_cast<std::uintptr_t>(arguments);
    arguments_range = {first, first + argument_bytes};
    latest = {0, 0};
    cells.clear();
    released.clear();
    if (module_range.end == 0) {
        find_module();
    }
}

std::uint32_t shared_offset(const void* pointer, Here here) {
    const std::size_t offset = static_cast<std::size_t>(static_cast<const char*>(pointer) -
                                                        static_cast<const char*>(block().shared));
    if (offset >= kSharedWindow) {
        fail(here, "an address that is not one of shared memory");
    }
    return static_cast<std::uint32_t>(offset);
}

void check_read(const void* address, std::size_t bytes, Here here) {
    check(reinterpret_cast<std::uintptr_t>(address), bytes, Access::kRead, here);
}

void check_write(void* address, std::size_t bytes, Here here) {
    check(reinterpret_cast<std::uintptr_t>(address), bytes, Access::kWrite, here);
}

// An atomic of a thread that has a fence of memory behind it publishes what it did and had seen,
// and sees what others have published at this address.
void check_atomic(void* address, std::size_t bytes, Here here) {
    Block& b = block();
    Thread& thread = *b.current;
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (at % bytes != 0) {
        fail(here, "an atomic of %zu bytes at an address that is no multiple of it", bytes);
    }
    check(at, bytes, Access::kAtomic, here);
    Released& others = released[at];
    if (others.block != b.ordinal) {
        others.block = b.ordinal;
        others.clock.assign(thread.clock.size(), 0);
    }
    b.acquired.insert(others.blocks.begin(), others.blocks.end());
    join(thread.clock, others.clock);
    if (b.fenced_memory) {
        others.blocks.insert(b.ordinal);
        others.blocks.insert(b.acquired.begin(), b.acquired.end());
        join(others.clock, thread.clock);
        thread.publish();
    }
}

void copy_unchecked(void* to, const void* from, std::size_t bytes) {
    std::memcpy(to, from, bytes);
}

void fence_memory() {
    block().fenced_memory = true;
}

void take_off(const Copy& copy, Here here) {
    Block& b = block();
    check_shared(copy.offset, copy.bytes, Access::kWrite, here);
    if (copy.source_bytes > 0) {
        check_read(copy.global, copy.source_bytes, here);
    }
    std::memset(b.shared + copy.offset, 0xFF, copy.bytes);
    std::fill_n(
        b.written.begin() + static_cast<std::ptrdiff_t>(copy.offset), copy.bytes, kInFlight);
}

void land(const Copy& copy, Epoch epoch) {
    Block& b = block();
    std::memcpy(b.shared + copy.offset, copy.global, copy.source_bytes);
    std::memset(b.shared + copy.offset + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    std::fill_n(b.written.begin() + static_cast<std::ptrdiff_t>(copy.offset), copy.bytes, epoch);
}

}  // namespace emulated_cuda
