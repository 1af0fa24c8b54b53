// What this machine can do: multiply-adds that touch registers only, and reading of memory.
//
// usage: peak THREADS SECONDS MEGABYTES
// Prints one line each: billions a second, name, instruction or access. Of five repetitions of
// about SECONDS the fastest counts. A multiply and an add are two operations. What the machine
// lacks is left out.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int kRepetitions = 5;
volatile std::uint64_t sink;

// Seconds until all threads have finished function(thread).
template <typename Function>
double run_threads(int num_threads, const Function& function) {
    const auto began = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int thread = 1; thread < num_threads; ++thread) {
        threads.emplace_back([&function, thread] { function(thread); });
    }
    function(0);
    for (std::thread& thread : threads) {
        thread.join();
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

#if defined(__AVX512F__)
#define PYFEAT_IN_REGISTER "+v"
#elif defined(__x86_64__)
#define PYFEAT_IN_REGISTER "+x"
#elif defined(__ARM_NEON)
#define PYFEAT_IN_REGISTER "+w"
#endif

// Each engine is one multiply-add instruction: operands, the step, and operations a step.

#if defined(__AVX512F__)
#define PYFEAT_FLOAT32
struct Float32 {
    static constexpr const char* name = "float32 vfmadd, 512 bits";
    static constexpr int operations = 2 * 16;
    static auto zero() {
        return _mm512_setzero_ps();
    }
    static auto one() {
        return _mm512_set1_ps(1);
    }
    static auto step(__m512 sum, __m512 left, __m512 right) {
        return _mm512_fmadd_ps(left, right, sum);
    }
};
#elif defined(__AVX2__) && defined(__FMA__)
#define PYFEAT_FLOAT32
struct Float32 {
    static constexpr const char* name = "float32 vfmadd, 256 bits";
    static constexpr int operations = 2 * 8;
    static auto zero() {
        return _mm256_setzero_ps();
    }
    static auto one() {
        return _mm256_set1_ps(1);
    }
    static auto step(__m256 sum, __m256 left, __m256 right) {
        return _mm256_fmadd_ps(left, right, sum);
    }
};
#elif defined(__ARM_NEON)
#define PYFEAT_FLOAT32
struct Float32 {
    static constexpr const char* name = "float32 fmla, 128 bits";
    static constexpr int operations = 2 * 4;
    static auto zero() {
        return vdupq_n_f32(0);
    }
    static auto one() {
        return vdupq_n_f32(1);
    }
    static auto step(float32x4_t sum, float32x4_t left, float32x4_t right) {
        return vfmaq_f32(sum, left, right);
    }
};
#endif

// Two tiles of each factor and four of sums, as many as a product of matrices can keep busy.
#if defined(__AMX_TILE__) && defined(__linux__)
#define PYFEAT_MATRIX_UNITS
struct alignas(64) MatrixConfiguration {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool have_matrix_units() {
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // asks for their registers
}

struct Bf16Matrices {
    static constexpr const char* name = "bf16 tdpbf16ps, 16 x 16 x 32";
    static constexpr int operations = 2 * 16 * 16 * 32;
    static void step() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

struct Int8Matrices {
    static constexpr const char* name = "int8 tdpbssd, 16 x 16 x 64";
    static constexpr int operations = 2 * 16 * 16 * 64;
    static void step() {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
};
#endif

#if defined(__AVX512BF16__)
#define PYFEAT_BF16
struct Bf16 {
    static constexpr const char* name = "bf16 vdpbf16ps, 512 bits";
    static constexpr int operations = 2 * 32;
    static auto zero() {
        return _mm512_setzero_ps();
    }
    static auto one() {
        return _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1));
    }
    static auto step(__m512 sum, __m512bh left, __m512bh right) {
        return _mm512_dpbf16_ps(sum, left, right);
    }
};
#endif

#if defined(__AVX512VNNI__)
#define PYFEAT_INT8
struct Int8 {
    static constexpr const char* name = "int8 vpdpbusd, 512 bits";
    static constexpr int operations = 2 * 64;
    static auto zero() {
        return _mm512_setzero_si512();
    }
    static auto one() {
        return _mm512_set1_epi8(1);
    }
    static auto step(__m512i sum, __m512i left, __m512i right) {
        return _mm512_dpbusd_epi32(sum, left, right);
    }
};
#elif defined(__AVXVNNI__)
#define PYFEAT_INT8
struct Int8 {
    static constexpr const char* name = "int8 vpdpbusd, 256 bits";
    static constexpr int operations = 2 * 32;
    static auto zero() {
        return _mm256_setzero_si256();
    }
    static auto one() {
        return _mm256_set1_epi8(1);
    }
    static auto step(__m256i sum, __m256i left, __m256i right) {
        return _mm256_dpbusd_avx_epi32(sum, left, right);
    }
};
#endif

#ifdef PYFEAT_IN_REGISTER
// The empty statement takes its operand in a register as changed: no step can be left out, merged
// with the next or moved out of the loop.
template <typename Value>
inline void change(Value& value) {
    asm volatile("" : PYFEAT_IN_REGISTER(value));
}

// Twelve chains: more than latency times throughput of any multiply-add unit, and with two operands
// they fit the 16 registers of AVX2.
constexpr int kChains = 12;

template <typename Engine>
void run_chains(std::int64_t steps) {
    auto left = Engine::one();
    auto right = Engine::one();
    change(left);
    change(right);
    auto a = Engine::zero(), b = a, c = a, d = a, e = a, f = a;
    auto g = a, h = a, i = a, j = a, k = a, l = a;
    const auto advance = [&left, &right](auto& sum) {
        sum = Engine::step(sum, left, right);
        change(sum);
    };
    for (std::int64_t step = 0; step < steps; ++step) {
        advance(a), advance(b), advance(c), advance(d), advance(e), advance(f);
        advance(g), advance(h), advance(i), advance(j), advance(k), advance(l);
    }
}

// Doubles the steps until a repetition of run(steps) takes `seconds`, then keeps the fastest of
// five.
template <typename Run>
void report_rate(
    int num_threads, double seconds, const char* name, double operations, const Run& run) {
    std::int64_t steps = 1 << 12;
    const auto repeat = [&] { return run_threads(num_threads, [&](int) { run(steps); }); };
    while (repeat() < seconds) {
        steps *= 2;
    }
    double fastest = repeat();
    for (int repetition = 1; repetition < kRepetitions; ++repetition) {
        fastest = std::min(fastest, repeat());
    }
    const double done = static_cast<double>(steps) * operations * num_threads;
    std::printf("%.6g %s\n", done / fastest * 1e-9, name);
}

template <typename Engine>
void report_chains(int num_threads, double seconds) {
    report_rate(
        num_threads, seconds, Engine::name, kChains * Engine::operations, run_chains<Engine>);
}
#endif

#ifdef PYFEAT_MATRIX_UNITS
template <typename Engine>
void report_matrices(int num_threads, double seconds) {
    constexpr int kProducts = 4;  // of one step
    report_rate(
        num_threads, seconds, Engine::name, kProducts * Engine::operations, [](std::int64_t steps) {
            static constexpr MatrixConfiguration configuration;
            _tile_loadconfig(&configuration);
            for (std::int64_t step = 0; step < steps; ++step) {
                Engine::step();
            }
            _tile_release();
        });
}
#endif

void report_read_bandwidth(int num_threads, std::size_t bytes) {
    const std::size_t count = bytes / sizeof(std::uint64_t) / static_cast<std::size_t>(num_threads);
    std::vector<std::unique_ptr<std::uint64_t[]>> parts(static_cast<std::size_t>(num_threads));
    // Each thread writes its own part first, so that its pages exist and lie near its processor.
    run_threads(num_threads, [&](int thread) {
        auto& part = parts[static_cast<std::size_t>(thread)];
        part = std::make_unique<std::uint64_t[]>(count);
        std::fill_n(part.get(), count, static_cast<std::uint64_t>(thread) + 1);
    });
    const auto repeat = [&] {
        return run_threads(num_threads, [&](int thread) {
            const std::uint64_t* part = parts[static_cast<std::size_t>(thread)].get();
            sink = std::accumulate(part, part + count, std::uint64_t{0});
        });
    };
    double fastest = repeat();
    for (int repetition = 1; repetition < kRepetitions; ++repetition) {
        fastest = std::min(fastest, repeat());
    }
    const double read = static_cast<double>(count * sizeof(std::uint64_t)) * num_threads;
    std::printf("%.6g read %zu MB in order\n", read / fastest * 1e-9, bytes >> 20);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: peak THREADS SECONDS MEGABYTES\n");
        return 2;
    }
    const int num_threads = std::max(1, std::atoi(argv[1]));
    [[maybe_unused]] const double seconds = std::atof(argv[2]);
    const auto megabytes = static_cast<std::size_t>(std::max(1, std::atoi(argv[3])));
#ifdef PYFEAT_FLOAT32
    report_chains<Float32>(num_threads, seconds);
#endif
#ifdef PYFEAT_MATRIX_UNITS
    if (have_matrix_units()) {
        report_matrices<Bf16Matrices>(num_threads, seconds);
        report_matrices<Int8Matrices>(num_threads, seconds);
    } else
#endif
    {
#ifdef PYFEAT_BF16
        report_chains<Bf16>(num_threads, seconds);
#endif
#ifdef PYFEAT_INT8
        report_chains<Int8>(num_threads, seconds);
#endif
    }
    report_read_bandwidth(num_threads, megabytes << 20);
    return 0;
}
