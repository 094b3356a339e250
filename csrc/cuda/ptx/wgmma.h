// The tensor core instruction of sm_90a: a warpgroup multiplies 64 x 16 by 16 x N, asynchronously.
#pragma once

#include <type_traits>

#include "cuda/ptx/convert.h"

namespace fastattn::cuda {

enum class Swizzle : uint64_t { k128 = 1, k64 = 2, k32 = 3 };

// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions: Matrix Descriptor". A matrix in shared memory made of
// blocks of 8 rows, each row one swizzle span (128, 64 or 32 bytes), aligned to 8 spans.
//
//   K-major (the span runs along k): stride_bytes between blocks of 8 of m or n; leading_bytes is not used; the next 16
//       of k within the span are at 32 bytes more.
//   MN-major (it runs along m or n): stride_bytes between blocks of 8 of k; leading_bytes between spans of m or n.
FASTATTN_DEVICE uint64_t matrix_descriptor(uint32_t shared, uint32_t leading_bytes, uint32_t stride_bytes,
                                           Swizzle swizzle) {
    return uint64_t{(shared & 0x3ffff) >> 4} | uint64_t{(leading_bytes & 0x3ffff) >> 4} << 16 |
           uint64_t{(stride_bytes & 0x3ffff) >> 4} << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// "...: wgmma.fence": before the first wgmma, and before one whose registers were written by other instructions.
FASTATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// "...: wgmma.commit_group".
FASTATTN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// "...: wgmma.wait_group": until at most kPending groups are in flight, of which d is not an accumulator. As an operand
// it keeps what reads it from moving above.
template <int kPending, int kCount>
FASTATTN_DEVICE void wgmma_wait(float (&d)[kCount]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// "...: wgmma.mma_async.m64nNk16", T: Half or BFloat16, N = 2 kCount: d = a b + (accumulate ? d : 0) in float.
//
// With w = warp % 4, g = lane / 4, t = 2 (lane % 4):
//   d[4 n + 2 h + e]  row 16 w + g + 8 h, column 8 n + t + e        so that d[8 k .. 8 k + 7], packed, is the operand a
//   a[r]              row 16 w + g + 8 (r % 2), k = t + 8 (r / 2)   in registers of a later product
// kMajorMN: operands in shared memory are MN-major instead of K-major.
// HAZARD: until the wait d is undefined, and neither d nor a in registers may be touched.
template <typename T, bool kMajorMNa, bool kMajorMNb, int kCount>
FASTATTN_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate);
template <typename T, bool kMajorMNb, int kCount>
FASTATTN_DEVICE void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate);

namespace wgmma_detail {

// One overload per N: the text of an instruction and its operands cannot be made by a template.
#define FASTATTN_TEXT_8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define FASTATTN_TEXT_32 FASTATTN_TEXT_8(0, 1, 2, 3, 4, 5, 6, 7) ", " FASTATTN_TEXT_8(8, 9, 10, 11, 12, 13, 14, 15) ", " \
    FASTATTN_TEXT_8(16, 17, 18, 19, 20, 21, 22, 23) ", " FASTATTN_TEXT_8(24, 25, 26, 27, 28, 29, 30, 31)
#define FASTATTN_TEXT_40 FASTATTN_TEXT_32 ", " FASTATTN_TEXT_8(32, 33, 34, 35, 36, 37, 38, 39)
#define FASTATTN_TEXT_48 FASTATTN_TEXT_40 ", " FASTATTN_TEXT_8(40, 41, 42, 43, 44, 45, 46, 47)
#define FASTATTN_TEXT_56 FASTATTN_TEXT_48 ", " FASTATTN_TEXT_8(48, 49, 50, 51, 52, 53, 54, 55)
#define FASTATTN_TEXT_64 FASTATTN_TEXT_56 ", " FASTATTN_TEXT_8(56, 57, 58, 59, 60, 61, 62, 63)
#define FASTATTN_TEXT_72 FASTATTN_TEXT_64 ", " FASTATTN_TEXT_8(64, 65, 66, 67, 68, 69, 70, 71)
#define FASTATTN_TEXT_80 FASTATTN_TEXT_72 ", " FASTATTN_TEXT_8(72, 73, 74, 75, 76, 77, 78, 79)
#define FASTATTN_TEXT_88 FASTATTN_TEXT_80 ", " FASTATTN_TEXT_8(80, 81, 82, 83, 84, 85, 86, 87)
#define FASTATTN_TEXT_96 FASTATTN_TEXT_88 ", " FASTATTN_TEXT_8(88, 89, 90, 91, 92, 93, 94, 95)
#define FASTATTN_TEXT_128 FASTATTN_TEXT_96 ", " FASTATTN_TEXT_8(96, 97, 98, 99, 100, 101, 102, 103) ", " \
    FASTATTN_TEXT_8(104, 105, 106, 107, 108, 109, 110, 111) ", " FASTATTN_TEXT_8(112, 113, 114, 115, 116, 117, 118, 119) ", " \
    FASTATTN_TEXT_8(120, 121, 122, 123, 124, 125, 126, 127)

#define FASTATTN_D_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTATTN_D_32 FASTATTN_D_8(0), FASTATTN_D_8(8), FASTATTN_D_8(16), FASTATTN_D_8(24)
#define FASTATTN_D_40 FASTATTN_D_32, FASTATTN_D_8(32)
#define FASTATTN_D_48 FASTATTN_D_40, FASTATTN_D_8(40)
#define FASTATTN_D_56 FASTATTN_D_48, FASTATTN_D_8(48)
#define FASTATTN_D_64 FASTATTN_D_56, FASTATTN_D_8(56)
#define FASTATTN_D_72 FASTATTN_D_64, FASTATTN_D_8(64)
#define FASTATTN_D_80 FASTATTN_D_72, FASTATTN_D_8(72)
#define FASTATTN_D_88 FASTATTN_D_80, FASTATTN_D_8(80)
#define FASTATTN_D_96 FASTATTN_D_88, FASTATTN_D_8(88)
#define FASTATTN_D_128 FASTATTN_D_96, FASTATTN_D_8(96), FASTATTN_D_8(104), FASTATTN_D_8(112), FASTATTN_D_8(120)

// count = N / 2 registers of d, %0 .. %(count - 1); n0 .. n6 number the operands after them.
#define FASTATTN_WGMMA_TEXT(type, n, count, operands, p) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FASTATTN_TEXT_##count "}, " operands ";\n}"
#define FASTATTN_WGMMA_SS(type, n, count, n0, n1, n2, n3, n4) \
    asm volatile(FASTATTN_WGMMA_TEXT(type, n, count, "%" #n0 ", %" #n1 ", p, 1, 1, %" #n3 ", %" #n4, n2) \
                 : FASTATTN_D_##count : "l"(a), "l"(b), "r"(accumulate), "n"(kMajorMNa), "n"(kMajorMNb))
#define FASTATTN_WGMMA_RS(type, n, count, n0, n1, n2, n3, n4, n5, n6) \
    asm volatile(FASTATTN_WGMMA_TEXT(type, n, count, "{%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 ", p, 1, 1, %" #n6, n5) \
                 : FASTATTN_D_##count : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kMajorMNb))
#define FASTATTN_WGMMA(n, count, n0, n1, n2, n3, n4, n5, n6) \
    template <typename T, int kMajorMNa, int kMajorMNb> \
    FASTATTN_DEVICE void multiply(float (&d)[count], uint64_t a, uint64_t b, int accumulate) { \
        if constexpr (std::is_same_v<T, Half>) FASTATTN_WGMMA_SS("f16", n, count, n0, n1, n2, n3, n4); \
        else FASTATTN_WGMMA_SS("bf16", n, count, n0, n1, n2, n3, n4); \
    } \
    template <typename T, int kMajorMNb> \
    FASTATTN_DEVICE void multiply(float (&d)[count], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
        if constexpr (std::is_same_v<T, Half>) FASTATTN_WGMMA_RS("f16", n, count, n0, n1, n2, n3, n4, n5, n6); \
        else FASTATTN_WGMMA_RS("bf16", n, count, n0, n1, n2, n3, n4, n5, n6); \
    }

FASTATTN_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
FASTATTN_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
FASTATTN_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
FASTATTN_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
FASTATTN_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
FASTATTN_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
FASTATTN_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
FASTATTN_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
FASTATTN_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
FASTATTN_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

}  // namespace wgmma_detail

template <typename T, bool kMajorMNa, bool kMajorMNb, int kCount>
FASTATTN_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
    wgmma_detail::multiply<T, kMajorMNa, kMajorMNb>(d, a, b, accumulate);
}
template <typename T, bool kMajorMNb, int kCount>
FASTATTN_DEVICE void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    wgmma_detail::multiply<T, kMajorMNb>(d, a, b, accumulate);
}

}  // namespace fastattn::cuda
