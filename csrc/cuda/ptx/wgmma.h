// The tensor core instruction of sm_90a: d (64 x N, in registers) = a (64 x 16) b (16 x N) + d, of e4m3 a (64 x 32) and
// b (32 x N), issued by the four warps of a warpgroup and done beside them.
#pragma once

#include "cuda/ptx/descriptor.h"
#include "cuda/ptx/e4m3.h"

namespace fastattn::cuda {

// Keeps the compiler from moving what touches these registers across this point.
template <int R>
FASTATTN_DEVICE void pin_registers(float (&d)[R]) {
#pragma unroll
    for (int n = 0; n < R; ++n) asm volatile("" : "+f"(d[n])::"memory");
}

// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions: wgmma.fence": before the first wgmma and whenever
// registers of accumulators or A fragments were touched since the last one.
template <int... R>
FASTATTN_DEVICE void wgmma_fence(float (&... d)[R]) {
    (pin_registers(d), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// "...: wgmma.commit_group": closes the group of the wgmmas since the last one.
FASTATTN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// "...: wgmma.wait_group": until at most kPending groups are in flight. Name the accumulators that are complete then:
// nothing that touches them moves above. HAZARD: until their wait, accumulators and A fragments are not to be touched.
template <int kPending, int... R>
FASTATTN_DEVICE void wgmma_wait(float (&... d)[R]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (pin_registers(d), ...);
}

// "...: wgmma.mma_async.sp/m64nNk16", "... /m64nNk32". T: Half, BFloat16 or E4M3; N: those listed at the end of this
// file.
//
// d[4 j + r] of lane l of warp w: row 16 w + l / 4 + 8 (r / 2), column 8 j + 2 (l % 4) + r % 2.
// A from registers (rs): as a of mma_m16n8k16, of the warp's 16 rows. Transposed: rows along M or N, see descriptor.h.
//
// E4M3: a step of K is 32 elements, the 32 bytes that 16 of the others are, so that descriptors and steps are the same;
// both operands have rows along K. a[r] has row l / 4 + 8 (r % 2), columns 4 (l % 4) + 16 (r / 2) and the next three.
// HAZARD: the unit keeps sums to some 13 bits of mantissa, not float's 23 (DeepSeek-AI, "DeepSeek-V3 Technical Report",
// 2024, section 3.3.2; Zhang et al., "SageAttention2", 2024): long sums are to be added up in registers.
template <typename T, int N>
struct Wgmma;

template <typename T, int N, bool kTransposeA = false, bool kTransposeB = false>
FASTATTN_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    Wgmma<T, N>::template ss<kTransposeA, kTransposeB>(d, a, b, accumulate);
}
template <typename T, int N, bool kTransposeB = false>
FASTATTN_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    Wgmma<T, N>::template rs<kTransposeB>(d, a, b, accumulate);
}

// Eight registers at a time: how they are written in PTX, and as operands.
// clang-format off
#define FASTATTN_P0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTATTN_P1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTATTN_P2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FASTATTN_P3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_P4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_P5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTATTN_P6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FASTATTN_P7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_P8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FASTATTN_P9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTATTN_P10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FASTATTN_P11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTATTN_P12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FASTATTN_P13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTATTN_P14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FASTATTN_P15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTATTN_PS1 FASTATTN_P0
#define FASTATTN_PS2 FASTATTN_PS1 FASTATTN_P1
#define FASTATTN_PS3 FASTATTN_PS2 FASTATTN_P2
#define FASTATTN_PS4 FASTATTN_PS3 FASTATTN_P3
#define FASTATTN_PS5 FASTATTN_PS4 FASTATTN_P4
#define FASTATTN_PS6 FASTATTN_PS5 FASTATTN_P5
#define FASTATTN_PS7 FASTATTN_PS6 FASTATTN_P6
#define FASTATTN_PS8 FASTATTN_PS7 FASTATTN_P7
#define FASTATTN_PS9 FASTATTN_PS8 FASTATTN_P8
#define FASTATTN_PS10 FASTATTN_PS9 FASTATTN_P9
#define FASTATTN_PS11 FASTATTN_PS10 FASTATTN_P10
#define FASTATTN_PS12 FASTATTN_PS11 FASTATTN_P11
#define FASTATTN_PS13 FASTATTN_PS12 FASTATTN_P12
#define FASTATTN_PS14 FASTATTN_PS13 FASTATTN_P13
#define FASTATTN_PS15 FASTATTN_PS14 FASTATTN_P14
#define FASTATTN_PS16 FASTATTN_PS15 FASTATTN_P15
#define FASTATTN_D(n) "+f"(d[8 * n + 0]), "+f"(d[8 * n + 1]), "+f"(d[8 * n + 2]), "+f"(d[8 * n + 3]), "+f"(d[8 * n + 4]), "+f"(d[8 * n + 5]), "+f"(d[8 * n + 6]), "+f"(d[8 * n + 7])
#define FASTATTN_DS1 FASTATTN_D(0)
#define FASTATTN_DS2 FASTATTN_DS1, FASTATTN_D(1)
#define FASTATTN_DS3 FASTATTN_DS2, FASTATTN_D(2)
#define FASTATTN_DS4 FASTATTN_DS3, FASTATTN_D(3)
#define FASTATTN_DS5 FASTATTN_DS4, FASTATTN_D(4)
#define FASTATTN_DS6 FASTATTN_DS5, FASTATTN_D(5)
#define FASTATTN_DS7 FASTATTN_DS6, FASTATTN_D(6)
#define FASTATTN_DS8 FASTATTN_DS7, FASTATTN_D(7)
#define FASTATTN_DS9 FASTATTN_DS8, FASTATTN_D(8)
#define FASTATTN_DS10 FASTATTN_DS9, FASTATTN_D(9)
#define FASTATTN_DS11 FASTATTN_DS10, FASTATTN_D(10)
#define FASTATTN_DS12 FASTATTN_DS11, FASTATTN_D(11)
#define FASTATTN_DS13 FASTATTN_DS12, FASTATTN_D(12)
#define FASTATTN_DS14 FASTATTN_DS13, FASTATTN_D(13)
#define FASTATTN_DS15 FASTATTN_DS14, FASTATTN_D(14)
#define FASTATTN_DS16 FASTATTN_DS15, FASTATTN_D(15)

#define FASTATTN_WGMMA(T, type, N, n, p0, p1, p2, p3, p4, p5, p6)                                                      \
    template <> struct Wgmma<T, N> {                                                                                   \
        template <bool kTransposeA, bool kTransposeB>                                                                  \
        static FASTATTN_DEVICE void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {                   \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p2 ", 0;\n"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" FASTATTN_PS##n "}, "              \
                p0 ", " p1 ", p, 1, 1, " p3 ", " p4 ";\n}\n"                                                           \
                : FASTATTN_DS##n                                                                                       \
                : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{kTransposeA}), "n"(int{kTransposeB}));    \
        }                                                                                                              \
        template <bool kTransposeB>                                                                                    \
        static FASTATTN_DEVICE void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {       \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p5 ", 0;\n"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" FASTATTN_PS##n "}, "              \
                "{" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", p, 1, 1, " p6 ";\n}\n"                                      \
                : FASTATTN_DS##n                                                                                       \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),               \
                  "n"(int{kTransposeB}));                                                                              \
        }                                                                                                              \
    };
#define FASTATTN_WGMMA_E4M3(N, n, p0, p1, p2, p3, p4, p5, p6)                                                          \
    template <> struct Wgmma<E4M3, N> {                                                                                \
        template <bool kTransposeA, bool kTransposeB>                                                                  \
        static FASTATTN_DEVICE void ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {                   \
            static_assert(!kTransposeA && !kTransposeB);                                                               \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p2 ", 0;\n"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" FASTATTN_PS##n "}, "                      \
                p0 ", " p1 ", p, 1, 1;\n}\n"                                                                           \
                : FASTATTN_DS##n                                                                                       \
                : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                  \
        }                                                                                                              \
        template <bool kTransposeB>                                                                                    \
        static FASTATTN_DEVICE void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {       \
            static_assert(!kTransposeB);                                                                               \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p5 ", 0;\n"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" FASTATTN_PS##n "}, "                      \
                "{" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", p, 1, 1;\n}\n"                                              \
                : FASTATTN_DS##n                                                                                       \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));              \
        }                                                                                                              \
    };
#define FASTATTN_WGMMA_N(N, n, ...) \
    FASTATTN_WGMMA(Half, "f16", N, n, __VA_ARGS__) FASTATTN_WGMMA(BFloat16, "bf16", N, n, __VA_ARGS__) \
    FASTATTN_WGMMA_E4M3(N, n, __VA_ARGS__)

// N, N / 16, and the operands that follow the N / 2 accumulators.
FASTATTN_WGMMA_N(16, 1, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
FASTATTN_WGMMA_N(32, 2, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
FASTATTN_WGMMA_N(48, 3, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
FASTATTN_WGMMA_N(64, 4, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
FASTATTN_WGMMA_N(80, 5, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
FASTATTN_WGMMA_N(96, 6, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
FASTATTN_WGMMA_N(112, 7, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
FASTATTN_WGMMA_N(128, 8, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
FASTATTN_WGMMA_N(144, 9, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
FASTATTN_WGMMA_N(160, 10, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
FASTATTN_WGMMA_N(176, 11, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
FASTATTN_WGMMA_N(192, 12, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
FASTATTN_WGMMA_N(208, 13, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
FASTATTN_WGMMA_N(224, 14, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
FASTATTN_WGMMA_N(240, 15, "%120", "%121", "%122", "%123", "%124", "%125", "%126")
FASTATTN_WGMMA_N(256, 16, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
// clang-format on

}  // namespace fastattn::cuda
