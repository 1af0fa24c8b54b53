// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.hpp"

#include <cstdint>

#include "check.hpp"

#if defined(PYFEAT_X86)
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(PYFEAT_AMX)
#include <sys/syscall.h>
#endif
#if defined(PYFEAT_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace pyfeat {
namespace {

#if defined(PYFEAT_X86)

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
#if defined(_MSC_VER)
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
    r.eax = static_cast<std::uint32_t>(values[0]);
    r.ebx = static_cast<std::uint32_t>(values[1]);
    r.ecx = static_cast<std::uint32_t>(values[2]);
    r.edx = static_cast<std::uint32_t>(values[3]);
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

// Which register files the operating system saves on a context switch.
std::uint64_t saved_state() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

bool has_bit(std::uint32_t word, int bit) {
    return ((word >> bit) & 1U) != 0;
}

// Whether the system saves the registers of matrix units; Linux wants to be asked by each process.
bool may_use_matrix_units([[maybe_unused]] std::uint64_t state) {
#if defined(PYFEAT_AMX)
    constexpr std::uint64_t kTileState = 0x60000;  // configuration and data
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return (state & kTileState) == kTileState &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

std::vector<Isa> detect() {
    std::vector<Isa> isas{Isa::kScalar};
    const Registers basic = cpuid(1, 0);
    const bool osxsave = has_bit(basic.ecx, 27);
    const bool fma = has_bit(basic.ecx, 12);
    if (!osxsave || !fma) {
        return isas;
    }
    const std::uint64_t state = saved_state();
    constexpr std::uint64_t kYmmState = 0x06;  // SSE and AVX
    constexpr std::uint64_t kZmmState = 0xE6;  // these, mask registers, and both halves of zmm
    const Registers extended = cpuid(7, 0);
    if ((state & kYmmState) == kYmmState && has_bit(extended.ebx, 5)) {
        isas.push_back(Isa::kAvx2);
        const Registers further = cpuid(7, 1);
        if (has_bit(further.eax, 4)) {
            isas.push_back(Isa::kAvx2Vnni);
        }
        const bool foundation = has_bit(extended.ebx, 16);
        const bool dword_qword = has_bit(extended.ebx, 17);
        const bool byte_word = has_bit(extended.ebx, 30);
        const bool vector_length = has_bit(extended.ebx, 31);
        if ((state & kZmmState) == kZmmState && foundation && dword_qword && byte_word &&
            vector_length) {
            isas.push_back(Isa::kAvx512);
            const bool vnni = has_bit(extended.ecx, 11), bfloat16 = has_bit(further.eax, 5);
            if (vnni) {
                isas.push_back(Isa::kAvx512Vnni);
            }
            if (vnni && bfloat16) {
                isas.push_back(Isa::kAvx512Bf16);
                const bool matrices = has_bit(extended.edx, 24),
                           of_bfloat16 = has_bit(extended.edx, 22),
                           of_bytes = has_bit(extended.edx, 25);
                if (matrices && of_bfloat16 && of_bytes && may_use_matrix_units(state)) {
                    isas.push_back(Isa::kAmx);
                }
            }
        }
    }
    return isas;
}

#elif defined(PYFEAT_ARM64)

std::vector<Isa> detect() {
    std::vector<Isa> isas{Isa::kScalar, Isa::kNeon};
#if defined(__APPLE__)
    isas.push_back(Isa::kNeonDot);  // every Apple processor of this kind has it
#elif defined(__linux__)
    if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) {
        isas.push_back(Isa::kNeonDot);
    }
#endif
    return isas;
}

#else

std::vector<Isa> detect() {
    return {Isa::kScalar};
}

#endif

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAmx:
            return "amx";
        case Isa::kAvx512Bf16:
            return "avx512_bf16";
        case Isa::kAvx512Vnni:
            return "avx512_vnni";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx2Vnni:
            return "avx2_vnni";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kNeonDot:
            return "neon_dot";
        case Isa::kNeon:
            return "neon";
        case Isa::kScalar:
            break;
    }
    return "scalar";
}

const std::vector<Isa>& available_isas() {
    static const std::vector<Isa> isas = detect();
    return isas;
}

Isa resolve_isa(const std::string& name) {
    const std::vector<Isa>& isas = available_isas();
    if (name.empty()) {
        return isas.back();
    }
    std::string known;
    for (const Isa isa : isas) {
        if (name == isa_name(isa)) {
            return isa;
        }
        known += known.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
    }
    fail("isa must be one of ", known, " on this machine, got ", name);
}

long second_level_cache_bytes() {
    static const long bytes = [] {
        long value = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        value = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        constexpr long kSmallest = 256L << 10, kLargest = 4L << 20, kUsual = 1L << 20;
        if (value <= 0) {
            return kUsual;
        }
        return value < kSmallest ? kSmallest : (value > kLargest ? kLargest : value);
    }();
    return bytes;
}

}  // namespace pyfeat
