// What bindings.cpp calls of int4_linear.cu.
#pragma once

#include "int4_linear_call.h"

namespace llama_fast {

// Launches the kernel on a CUDA stream of the current device: no allocation, no waiting, so also into a graph that is
// being captured. Throws std::invalid_argument for a group size that does not exist and std::runtime_error with the
// CUDA error's number, name and remedy.
void launch_int4_linear(const Int4LinearCall& call, void* stream);

// Loads every instance onto the current device, so that the first launch may be a captured one; throws as above.
void load_kernels();

}  // namespace llama_fast
