// Shared memory, as 32-bit addresses only: smem_base() plus constants.
#pragma once

#include "cuda/ptx/memory_types.h"

namespace fastattn::cuda {

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// Where the block's dynamic shared memory begins, as many bytes as the launch asked for; a multiple of 1024.
FASTATTN_DEVICE uint32_t smem_base() { return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory)); }

// PTX ISA, "Data Movement and Conversion Instructions: ld". T of 1, 2, 4, 8 or 16 bytes, aligned to its size.
template <typename T>
FASTATTN_DEVICE T load_shared(uint32_t address) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 1) {
        uint32_t v;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
        return bit_cast<T>(static_cast<uint8_t>(v));
    } else if constexpr (sizeof(T) == 2) {
        uint16_t v;
        asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
        return bit_cast<T>(v);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t v;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
        return bit_cast<T>(v);
    } else if constexpr (sizeof(T) == 8) {
        Words2 v;
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
        return bit_cast<T>(v);
    } else {
        Words4 v;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(address)
                     : "memory");
        return bit_cast<T>(v);
    }
}

// PTX ISA, "Data Movement and Conversion Instructions: st". The same sizes.
template <typename T>
FASTATTN_DEVICE void store_shared(uint32_t address, const T& value) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 1) {
        const uint32_t v = bit_cast<uint8_t>(value);
        asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(v) : "memory");
    } else if constexpr (sizeof(T) == 2) {
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(bit_cast<uint16_t>(value)) : "memory");
    } else if constexpr (sizeof(T) == 4) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(bit_cast<uint32_t>(value)) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        const Words2 v = bit_cast<Words2>(value);
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
    } else {
        const Words4 v = bit_cast<Words4>(value);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
    }
}

}  // namespace fastattn::cuda
