// What bindings.cpp calls of linear.cu.
#pragma once

#include "linear_call.h"

namespace llama_fast {

// Launches the kernel on a CUDA stream of the current device: no allocation, no waiting, so also into a graph that is
// being captured. A tile of 0, 0 is chosen by choose_tile. Throws std::invalid_argument for a tile that does not exist
// and std::runtime_error with the CUDA error's number, name and remedy.
void launch_linear(const LinearCall& call, LinearTile tile, void* stream);

// Loads every instance onto the current device, so that the first launch may be a captured one; throws as above.
void load_kernels();

}  // namespace llama_fast
