// How operands of wgmma lie in shared memory, and the 64 bits that say so.
#pragma once

#include "cuda/ptx/execution.h"

namespace fastattn::cuda {

// Rows of 128 bytes in atoms of 8 rows, 1024 bytes that are a multiple of 1024: of a row r the 16-byte chunk c lies at
// chunk c ^ (r % 8). What TMA writes with Swizzle::k128Bytes. The address of chunk-aligned bytes in such a tile:
FASTATTN_DEVICE uint32_t swizzle_128(uint32_t address) { return address ^ ((address >> 3) & 0x70u); }

// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions: Matrix Descriptor Format", 128-byte swizzle.
//
// An operand whose rows are along K (64 elements of 16 bits a row): stride is from 8 rows to the next 8, 1024 in a
// dense tile; leading is unused, 16; a step of 16 in K adds 32 to the address. An operand whose rows are along M or N
// ("transposed"): leading is from 64 columns to the next 64, stride from 8 rows of K to the next 8, 1024; a step of 16
// in K adds 2048.
FASTATTN_DEVICE uint64_t descriptor_128(uint32_t address, uint32_t leading, uint32_t stride) {
    return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | static_cast<uint64_t>((leading & 0x3ffffu) >> 4) << 16 |
           static_cast<uint64_t>((stride & 0x3ffffu) >> 4) << 32 | uint64_t{1} << 62;
}

}  // namespace fastattn::cuda
