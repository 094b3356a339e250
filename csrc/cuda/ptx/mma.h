// The tensor core instruction of sm_80 and later: d += a b for a 16 x 16, b 16 x 8, d 16 x 8, summed in float.
#pragma once

#include "cuda/ptx/convert.h"

namespace fastattn::cuda {

// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma.sync.m16n8k16", T: Half or BFloat16.
//
// With g = lane / 4 and t = 2 (lane % 4):
//   a[0] (g, t..t+1)  a[1] (g + 8, t..t+1)  a[2] (g, t+8..t+9)  a[3] (g + 8, t+8..t+9)     as (row, k)
//   b0   (t..t+1, g)  b1   (t+8..t+9, g)                                                   as (k, column)
//   d[0], d[1] (g, t..t+1)  d[2], d[3] (g + 8, t..t+1)                                     as (row, column)
// d of two neighbouring column tiles, packed, is a of the next product.
template <typename T>
FASTATTN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FASTATTN_DEVICE void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FASTATTN_DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastattn::cuda
