// What csrc/bindings.cpp expects besides the CUDA kernels.
#include "check.h"
#include "cpu/attention.h"

namespace fastattn::cpu {

void attention_forward(const AttentionParams&) { check(false, "the emulation has no CPU kernels"); }
void attention_backward(const AttentionParams&) { check(false, "the emulation has no CPU kernels"); }
const char* instruction_set() { return "none"; }
void leave_openmp() {}
std::vector<std::string> instruction_sets() { return {}; }

}  // namespace fastattn::cpu
