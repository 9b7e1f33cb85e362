// A call of the linear kernel: what it gets, and which tile serves it.
#pragma once

#include <cstdint>

namespace llama_fast {

// Numbers as in llama_fast/ops/cuda_extension.py.
enum class Activation : int { none, silu, gelu, gelu_tanh, relu };

// Addresses in the GPU's memory, null for none; bf16 where nothing else is said.
struct LinearCall {
    const uint16_t* x;         // [num_rows, in_features], rows x_stride elements apart
    const uint16_t* weight;    // [out_features, in_features]; with an activation gate's rows, then as many of up
    const uint16_t* bias;      // [out_features], or gate's, then up's
    const uint16_t* residual;  // [num_rows, out_features]
    void* out;                 // [num_rows, out_features], bf16 or fp32
    int64_t x_stride;
    int64_t num_rows;
    int64_t out_features;  // of the result
    int in_features;
    Activation activation;
    bool out_is_float;
};

// Token rows in eights and weight rows in sixteens that a block computes; of gate and of up as many.
struct LinearTile {
    int token_tiles, weight_tiles;
};

// 1, 2, 4 or 8 token tiles: up to 64 rows the weight is read once. Two weight tiles halve what is read of x, where
// enough blocks remain. Not measured yet. No choice changes a bit.
inline LinearTile choose_tile(int64_t num_rows, int64_t out_features, bool gated) {
    const int token_tiles = num_rows <= 8 ? 1 : num_rows <= 16 ? 2 : num_rows <= 32 ? 4 : 8;
    return {token_tiles, !gated && token_tiles >= 4 && out_features >= 4096 ? 2 : 1};
}

}  // namespace llama_fast
