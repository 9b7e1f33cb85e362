// linear for generated rows: x times the weight's transpose in bf16, with the epilogues of kernels/linear.py.
//
// Traffic  Weight once up to 64 rows: memory-bound. Every tile of the weight reads x, from L1 or L2.
//          Not measured yet.
// Operands The weight is the matrix instruction's A, 16 output features high, the tokens its B, eight wide: a column of
//          an instruction is a token, and no column sees another. Nothing is staged in shared memory: a thread's 16
//          bytes of a row are eight neighbours along the sum, and feed two instructions if the sum is taken in another
//          order, the same for x. Of 32 products k = 8 q + e (q = lane % 4) the first instruction takes e = 0, 1 where
//          it wants its k = 2 q, 2 q + 1 and e = 2, 3 where it wants 2 q + 8, 2 q + 9; the second takes e = 4 to 7.
// Sums     The sum is cut into four slices of whole chunks of 32, a warp each, as in_features alone says; a slice's
//          instructions run in ascending order, and slices are added as ((0 + 1) + 2) + 3. So a row's bits depend on
//          nothing but the row, the weight and the epilogue: neither on the number of rows, nor on a row's place, nor
//          on the tile.
// Tiles    A thread has 16 loads of the weight on their way, in four blocks a multiprocessor up to 16 rows, in three up
//          to 32, in two at 64 with gate and up or 32 weight rows: 64 KB at least. Three blocks there, with eight loads
//          (48 KB), spilled registers on sm_90. A gated block has 16 rows of gate and 16 of up; more would not fit.
// Rounding As kernels/linear.py: bias in fp32; the projection to bf16 before a residual is added, gate and up to bf16
//          before the activation.
// Source   PTX ISA, "Matrix Fragments for mma.m16n8k16" (device.h).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#include "device.h"
#else
#include "emulated_cuda.h"
#endif
#include "linear_call.h"

namespace llama_fast {

constexpr int kChunk = 32, kSlices = 4, kLanes = 32, kThreads = kSlices * kLanes;

// Chunks of a slice; the last slices may have fewer or none.
__device__ __forceinline__ int slice_chunks(const LinearCall& call) {
    const int chunks = (call.in_features + kChunk - 1) / kChunk;
    return (chunks + kSlices - 1) / kSlices;
}

// TT token tiles and WT weight tiles (LinearTile); GATED: as many again of up.
template <int TT, int WT, bool GATED>
struct LinearShape {
    static constexpr int tokens = 8 * TT, outs = 16 * WT, weight_tiles = GATED ? 2 * WT : WT;
    static constexpr int width = 16 * weight_tiles;
    // Chunks whose weights are on their way while earlier ones are multiplied: 16 loads of a thread. x comes from
    // nearer.
    static constexpr int depth = 8 / weight_tiles;
    static constexpr int x_depth = TT <= 4 ? 4 / TT : 1;
    // Blocks of a multiprocessor that the registers are to suffice for: at least 64 KB of weights are on their way.
    static constexpr int blocks = TT <= 2 ? 4 : TT * weight_tiles <= 8 ? 3 : 2;
    static_assert(depth % x_depth == 0);
};

// The slices' sums of a block, [slice][token][weight row].
template <class Shape>
struct LinearSums {
    float values[kSlices][Shape::tokens][Shape::width];

    // The warp's lanes write eight weight rows of four tokens, two apart, at once: without the exclusive or those of
    // different tokens would meet in one bank.
    __device__ __forceinline__ float& at(int slice, int token, int weight_row) {
        return values[slice][token][weight_row ^ (token / 2 % (Shape::width / 8) * 8)];
    }

    __device__ __forceinline__ float total(int token, int weight_row) {
        float sum = at(0, token, weight_row);
        for (int slice = 1; slice < kSlices; ++slice) sum += at(slice, token, weight_row);
        return sum;
    }
};

// As llama_fast/kernels/silu_mul.py; NaN stays NaN.
__device__ __forceinline__ float activated(float x, Activation activation) {
    switch (activation) {
        case Activation::silu:
            return x / (1.0f + expf(-x));
        case Activation::gelu:
            return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
        case Activation::gelu_tanh:
            return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
        default:
            return x < 0.0f ? 0.0f : x;
    }
}

// The slice of a warp: acc[m][n][i] of weight tile m and token tile n, where the matrix instruction has it.
template <class Shape, int TT, int WT>
__device__ __forceinline__ void sum_slice(const LinearCall& call, int64_t first_row, int64_t first_out, int slice,
                                          int lane, float (&acc)[Shape::weight_tiles][TT][4]) {
    constexpr int kDepth = Shape::depth, kXDepth = Shape::x_depth, kTiles = Shape::weight_tiles;
    const int group = lane / 4, quad = lane % 4;
    const int length = slice_chunks(call), begin = slice * length * kChunk;
    const int end = begin + length * kChunk < call.in_features ? begin + length * kChunk : call.in_features;
    const uint64_t policy = weight_policy();

    // Rows past the last one are read as the last one, and stored nowhere. A block's first row takes 64 bits (an LM
    // head has 2.1e9 elements), the others 32 more from there: cuda_extension.py limits a row to 2^24 elements.
    const int k = begin + 8 * quad;
    const bfloat16* weight_base = call.weight + first_out * call.in_features + k;
    const bfloat16* up_base = weight_base + call.out_features * call.in_features;
    const bfloat16* x_base = call.x + first_row * call.x_stride + k;
    int weight_offset[WT][2], x_offset[TT];
#pragma unroll
    for (int m = 0; m < WT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t last = call.out_features - 1 - first_out, row = 16 * m + 8 * half + group;
            weight_offset[m][half] = static_cast<int>(row < last ? row : last) * call.in_features;
        }
    }
#pragma unroll
    for (int n = 0; n < TT; ++n) {
        const int64_t last = call.num_rows - 1 - first_row, row = 8 * n + group;
        x_offset[n] = static_cast<int>((row < last ? row : last) * call.x_stride);
    }

    // Eight elements of a row lie inside the slice and the row, or beyond: in_features is a multiple of eight.
    int chunk = begin;
    const int own_end = end - 8 * quad;
    const Vector zero{0, 0, 0, 0};
    Vector weight[kDepth][kTiles][2], x[kXDepth][TT];
    const auto fetch_weight = [&](Vector(&target)[kTiles][2], int ahead) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const bfloat16* row = (m < WT ? weight_base : up_base) + weight_offset[m % WT][half];
                target[m][half] = chunk + ahead < own_end ? load_weight(row + ahead, policy) : zero;
            }
        }
    };
    const auto fetch_x = [&](int n, int ahead) {
        return chunk + ahead < own_end ? load_token(x_base + x_offset[n] + ahead) : zero;
    };
#pragma unroll
    for (int u = 0; u < kDepth; ++u) fetch_weight(weight[u], u * kChunk);
#pragma unroll
    for (int u = 0; u < kXDepth; ++u) {
#pragma unroll
        for (int n = 0; n < TT; ++n) x[u][n] = fetch_x(n, u * kChunk);
    }

    for (; chunk < end; chunk += kDepth * kChunk) {
#pragma unroll
        for (int u = 0; u < kDepth; ++u) {
            // The same for the whole warp. A chunk of zeros would do no harm, but their number would follow the tile.
            if (chunk + u * kChunk < end) {
#pragma unroll
                for (int n = 0; n < TT; ++n) {
                    const Vector tokens = x[u % kXDepth][n];
#pragma unroll
                    for (int m = 0; m < kTiles; ++m) {
                        const Vector &low = weight[u][m][0], &high = weight[u][m][1];
                        matrix_multiply(acc[m][n], low.x, high.x, low.y, high.y, tokens.x, tokens.y);
                    }
#pragma unroll
                    for (int m = 0; m < kTiles; ++m) {
                        const Vector &low = weight[u][m][0], &high = weight[u][m][1];
                        matrix_multiply(acc[m][n], low.z, high.z, low.w, high.w, tokens.z, tokens.w);
                    }
                    x[u % kXDepth][n] = fetch_x(n, (u + kXDepth) * kChunk);
                }
                fetch_weight(weight[u], (u + kDepth) * kChunk);
            }
        }
        weight_base += kDepth * kChunk;
        up_base += kDepth * kChunk;
        x_base += kDepth * kChunk;
    }
}

// A thread's part of block `block` of linear_blocks(); `sums` is the block's shared memory.
template <int TT, int WT, bool GATED>
__device__ __forceinline__ void linear_block(const LinearCall& call, unsigned block, int thread,
                                             LinearSums<LinearShape<TT, WT, GATED>>& sums) {
    using Shape = LinearShape<TT, WT, GATED>;
    const int lane = thread % kLanes, slice = thread / kLanes, group = lane / 4, quad = lane % 4;
    // Blocks that share a tile of the weight are neighbours, so that L2 serves all but the first.
    const unsigned passes = static_cast<unsigned>((call.num_rows + Shape::tokens - 1) / Shape::tokens);
    const int64_t first_out = static_cast<int64_t>(block / passes) * Shape::outs;
    const int64_t first_row = static_cast<int64_t>(block % passes) * Shape::tokens;

    float acc[Shape::weight_tiles][TT][4] = {};
    sum_slice<Shape, TT, WT>(call, first_row, first_out, slice, lane, acc);
#pragma unroll
    for (int m = 0; m < Shape::weight_tiles; ++m) {
#pragma unroll
        for (int n = 0; n < TT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums.at(slice, 8 * n + 2 * quad + i % 2, 16 * m + 8 * (i / 2) + group) = acc[m][n][i];
            }
        }
    }
    barrier();

    for (int index = thread; index < Shape::tokens * Shape::outs; index += kThreads) {
        const int token = index / Shape::outs, weight_row = index % Shape::outs;
        const int64_t row = first_row + token, out = first_out + weight_row;
        if (row >= call.num_rows || out >= call.out_features) continue;
        const int64_t place = row * call.out_features + out;
        float y = sums.total(token, weight_row);
        if (call.bias != nullptr) y += load_float(call.bias + out);
        if constexpr (GATED) {
            float up = sums.total(token, weight_row + Shape::outs);
            if (call.bias != nullptr) up += load_float(call.bias + call.out_features + out);
            y = activated(widened(rounded(y)), call.activation) * widened(rounded(up));
        } else if (call.residual != nullptr) {
            y = widened(rounded(y)) + load_float(call.residual + place);
        }
        if (call.out_is_float) {
            store(static_cast<float*>(call.out) + place, y);
        } else {
            store(static_cast<bfloat16*>(call.out) + place, rounded(y));
        }
    }
}

// Blocks of a call.
template <class Shape>
int64_t linear_blocks(const LinearCall& call) {
    return (call.num_rows + Shape::tokens - 1) / Shape::tokens * ((call.out_features + Shape::outs - 1) / Shape::outs);
}

}  // namespace llama_fast
