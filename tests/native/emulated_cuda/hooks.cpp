// SPDX-License-Identifier: Apache-2.0
// The hooks that the compiler calls at every access of a kernel.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>

#include "memory.hpp"

namespace emulated_cuda {
namespace {

void* hooked = nullptr;  // where the latest access is
constexpr const char* kHooked = "a kernel";

// From the hooks of the compiler.
void access(const void* address, std::size_t bytes, Access kind, bool aligned, void* from) {
    const Block& b = block();
    if (b.current == nullptr || b.performs) {
        return;  // on the host, or checked otherwise
    }
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (b.current->fiber.holds(at)) {
        return;
    }
    hooked = from;
    if (aligned && at % bytes != 0) {
        fail({kHooked, 0},
             "a %s of %zu bytes at an address that is no multiple of it",
             name_of(kind),
             bytes);
    }
    check(at, bytes, kind, {kHooked, 0});
}

}  // namespace

bool is_hooked(Here here) {
    return here.file == kHooked;
}

std::string place_of(const void* code) {
    Dl_info info;
    if (dladdr(code, &info) == 0) {
        return "?";
    }
    const auto offset =
        reinterpret_cast<std::uintptr_t>(code) - reinterpret_cast<std::uintptr_t>(info.dli_fbase);
    char command[1024];
    std::snprintf(command,
                  sizeof(command),
                  "addr2line --demangle --functions --pretty-print --basenames --exe='%s' %#zx",
                  info.dli_fname,
                  static_cast<std::size_t>(offset));
    std::string line;
    if (FILE* pipe = popen(command, "r")) {
        char text[512];
        while (std::fgets(text, sizeof(text), pipe) != nullptr) {
            line += text;
        }
        pclose(pipe);
    }
    line.erase(std::min(line.find('\n'), line.size()));
    return line;
}

const void* hooked_code() {
    return static_cast<const char*>(hooked) - 1;  // the call, not what follows
}

}  // namespace emulated_cuda

// What -fsanitize=thread calls.
#define HOOK extern "C" __attribute__((visibility("hidden"), used)) void
// Accesses that are volatile count as atomic.
#define HOOK_OF(name, bytes, kind)                                                      \
    HOOK __tsan_##name##bytes(void* at) {                                               \
        emulated_cuda::access(                                                          \
            at, bytes, emulated_cuda::Access::kind, true, __builtin_return_address(0)); \
    }
#define HOOKS(bytes)                           \
    HOOK_OF(read, bytes, kRead)                \
    HOOK_OF(write, bytes, kWrite)              \
    HOOK_OF(volatile_read, bytes, kAtomicRead) \
    HOOK_OF(volatile_write, bytes, kAtomic)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK __tsan_read_range(void* at, unsigned long bytes) {
    emulated_cuda::access(
        at, bytes, emulated_cuda::Access::kRead, false, __builtin_return_address(0));
}
HOOK __tsan_write_range(void* at, unsigned long bytes) {
    emulated_cuda::access(
        at, bytes, emulated_cuda::Access::kWrite, false, __builtin_return_address(0));
}
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_vptr_update(void**, void*) {}
