// The most this processor can do, for benchmarks/peaks.py, compiled for the machine at hand: loops of nothing but
// multiply-adds in registers, and one that reads memory. Each returns the operations or bytes it did, 0 where the
// processor has no such instructions.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#else
constexpr int kBytes = 16, kSums = 12;
#endif
typedef float Floats __attribute__((vector_size(kBytes)));
typedef uint64_t Words __attribute__((vector_size(kBytes), aligned(8)));

// What a loop computes ends here, so that it is not left out.
volatile uint64_t sink;

int64_t fma(int64_t rounds) {
    Floats sum[kSums], factor = Floats{} + 0.9999f, add = Floats{} + 1e-4f;
    for (int i = 0; i < kSums; ++i) sum[i] = Floats{} + static_cast<float>(i);
    for (int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * factor + add;
    }
    for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
    sink = static_cast<uint64_t>(sum[0][0]);
    return rounds * kSums * (kBytes / 4) * 2;
}

int64_t vdpbf16(int64_t rounds) {
#if defined(__AVX512BF16__)
    __m512 sum[16];
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
    const __m512bh one = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1));
    for (int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], one, one);
    }
    for (int i = 1; i < 16; ++i) sum[0] += sum[i];
    sink = static_cast<uint64_t>(sum[0][0]);
    return rounds * 16 * 32 * 2;
#else
    return rounds * 0;
#endif
}

int64_t amx(int64_t rounds) {
#if defined(__AMX_BF16__) && defined(__linux__)
    struct alignas(64) Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t k = 0; k < rounds; ++k) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return rounds * 4 * 16 * 16 * 32 * 2;
#else
    return rounds * 0;
#endif
}

// From four places in turn: where memory is read through pages of 4 KiB, one place alone gives less.
int64_t read(const char* from, int64_t bytes) {
    constexpr int64_t kPlaces = 4, kPage = 4096;
    Words any[8] = {};
    const int64_t part = bytes / (kPlaces * kPage) * kPage;
    const auto row = [&](int64_t at) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) any[i] |= *reinterpret_cast<const Words*>(from + at + i * kBytes);
    };
    for (int64_t at = 0; at < part; at += 8 * kBytes) {
        for (int64_t place = 0; place < kPlaces; ++place) row(place * part + at);
    }
    int64_t at = kPlaces * part;
    for (; at + 8 * kBytes <= bytes; at += 8 * kBytes) row(at);
    for (int i = 1; i < 8; ++i) any[0] |= any[i];
    sink = any[0][0];
    return at;
}

// On torch's OpenMP threads where it has them, as the kernels are: others would share their cores with those, which
// spin after torch's own work, and find less than there is.
template <typename Work>
int64_t in_threads(int threads, const Work& work) {
    std::atomic<int> next{0};
    std::atomic<int64_t> total{0};
    auto run = [&] {
        for (int t = next++; t < threads; t = next++) total += work(t);
    };
    using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
    if (const auto openmp = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))) {
        openmp([](void* shared) { (*static_cast<decltype(run)*>(shared))(); }, &run, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int t = 1; t < threads; ++t) others.emplace_back(run);
        run();
        for (auto& other : others) other.join();
    }
    return total;
}

}  // namespace

extern "C" {
int64_t peak_fma(int threads, int64_t rounds) {
    return in_threads(threads, [=](int) { return fma(rounds); });
}
int64_t peak_vdpbf16(int threads, int64_t rounds) {
    return in_threads(threads, [=](int) { return vdpbf16(rounds); });
}
int64_t peak_amx(int threads, int64_t rounds) {
    return in_threads(threads, [=](int) { return amx(rounds); });
}
// Both tensors of a decoding call, half by half.
int64_t peak_read(int threads, const char* a, const char* b, int64_t bytes) {
    const int64_t part = bytes / threads / 64 * 64;
    return in_threads(threads, [=](int t) { return read(a + t * part, part) + read(b + t * part, part); });
}
}
