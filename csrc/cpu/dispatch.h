// Which instruction sets this processor has, and the kernels in use.
#pragma once

#include <string>
#include <vector>

#include "calls.h"

namespace llama_fast {

// Names of the sets that can run here, best first; empty on a processor without AVX2, FMA and F16C.
std::vector<std::string> instruction_sets();

// The best of them, or the one that select_kernels chose. Throws std::runtime_error where none runs.
const Kernels& kernels();

// Makes `name` the one in use. Throws std::invalid_argument unless it is one of instruction_sets().
void select_kernels(const std::string& name);

}  // namespace llama_fast
