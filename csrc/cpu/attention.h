// The CPU kernels' entry points: any strides, any of the four dtypes, results independent of the number of threads.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace fastattn::cpu {

void attention_forward(const AttentionParams& params);   // writes out, lse
void attention_backward(const AttentionParams& params);  // writes dq, dk, dv and, where wanted, dbias

// "amx", "avx512_bf16", "avx512", "avx2" or "portable": the best this processor runs, or FASTATTN_CPU_ISA from the
// environment.
const char* instruction_set();
std::vector<std::string> instruction_sets();  // all that this processor runs, best first

// For a process that was forked before this library was loaded, from one whose OpenMP may have had threads.
void leave_openmp();

}  // namespace fastattn::cpu
