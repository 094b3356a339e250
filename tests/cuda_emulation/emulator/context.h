// Switching between stacks: a CUDA thread is a fiber.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastattn::cuda::emulation {

#if defined(__x86_64__)
extern "C" void fastattn_emulation_switch(void** save, void* load);

class Context {
public:
    void start(char* stack, size_t bytes, void (*entry)()) {
        auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{63});
        *--top = 0;  // entry's return address, never used: the stack pointer is 8 mod 16 at its first instruction
        *--top = reinterpret_cast<uint64_t>(entry);
        for (int n = 0; n < 6; ++n) *--top = 0;  // callee-saved registers
        pointer_ = top;
    }
    static void swap(Context& from, Context& to) { fastattn_emulation_switch(&from.pointer_, to.pointer_); }

private:
    void* pointer_ = nullptr;
};
#else
class Context {
public:
    void start(char* stack, size_t bytes, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    static void swap(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

private:
    ucontext_t context_;
};
#endif

}  // namespace fastattn::cuda::emulation
