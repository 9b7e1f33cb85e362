// A call of the int4_linear kernel: what it gets, and which tile serves it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LLAMA_FAST_EVERYWHERE __host__ __device__
#else
#define LLAMA_FAST_EVERYWHERE
#endif

namespace llama_fast {

// Numbers as in llama_fast/ops/cuda_extension.py.
enum class Activation : int { none, silu, gelu, gelu_tanh, relu };

// Addresses in the GPU's memory, null for none; bf16 where nothing else is said. With an activation the weight has
// gate's rows, then as many of up.
struct Int4LinearCall {
    const uint16_t* x;         // [num_rows, in_features], rows x_stride elements apart
    const uint32_t* words;     // [blocks of 128, weight rows, 16]: PlanarInt4 of llama_fast/kernels/int4_linear.py
    const uint16_t* scales;    // [groups, weight rows]
    const uint16_t* zeros;     // [groups, weight rows], integers; null: 8 throughout
    const uint16_t* bias;      // [weight rows]
    const uint16_t* residual;  // [num_rows, out_features]
    void* out;                 // [num_rows, out_features], bf16 or fp32
    int64_t x_stride;
    int64_t num_rows;
    int64_t out_features;  // of the result
    int in_features;       // a multiple of group_size
    int group_size;        // 32, 64 or 128
    Activation activation;
    bool out_is_float;
    int depth;  // steps on their way to shared memory; launch_int4_linear chooses it
};

// A block of the words, and what a warp takes at a time: two of them.
constexpr int kBlock = 128, kStepBlocks = 2, kStep = kStepBlocks * kBlock;
// Rows of a weight tile, words of a row's block.
constexpr int kTile = 16, kWords = 16;

// Parts that the sum is cut into: of whole steps, added in ascending order. in_features alone says how many; where it
// is large, sixteen outputs alone keep enough loads on their way.
constexpr int kMostSlices = 8;
LLAMA_FAST_EVERYWHERE constexpr int num_slices(int in_features) { return in_features >= 8192 ? kMostSlices : 4; }

// What a block of threads computes, token rows in eights and weight rows in sixteens; how many slices at a time; how
// many steps are in shared memory or on their way there. No choice changes a bit.
struct Int4Tile {
    int token_tiles, weight_tiles, slices, depth;
};

// With more rows of x more weight rows share them. Above 32 rows the weight is read again, from L2: x of more would not
// fit shared memory.
constexpr Int4Tile kPlainTiles[] = {{4, 4, 2, 0}, {2, 2, 4, 0}, {1, 1, 8, 0}, {1, 1, 4, 0}};
constexpr Int4Tile kGatedTiles[] = {{4, 4, 2, 0}, {2, 2, 4, 0}, {1, 2, 4, 0}};

// --- bytes of shared memory ------------------------------------------------------------------------------------------

// From a token to the next: 32 more than a step's, so that lanes of other tokens read other banks.
constexpr int kPitch = 2 * kStep + 32;

// Of a weight tile's step: its words; its scales, and as many of its zeros.
constexpr int kBlockBytes = 4 * kTile * kWords, kWordsBytes = kStepBlocks * kBlockBytes;
LLAMA_FAST_EVERYWHERE constexpr int scales_bytes(int group_size) { return 2 * kTile * (kStep / group_size); }
LLAMA_FAST_EVERYWHERE constexpr int tile_bytes(int group_size) { return kWordsBytes + 2 * scales_bytes(group_size); }

// A slice's stage: a step of its weight tiles, then of x.
LLAMA_FAST_EVERYWHERE constexpr int stage_bytes(int weight_tiles, int group_size, int rows) {
    return weight_tiles * tile_bytes(group_size) + rows * kPitch;
}

// The sums [slice][token][weight row]; four more of a token for other banks.
LLAMA_FAST_EVERYWHERE constexpr int sums_pitch(int weight_tiles) { return kTile * weight_tiles + 4; }
LLAMA_FAST_EVERYWHERE constexpr int sums_bytes(int token_tiles, int weight_tiles, int slices) {
    return 4 * slices * 8 * token_tiles * sums_pitch(weight_tiles);
}

constexpr int shared_bytes(const Int4Tile& tile, int group_size, int rows) {
    return sums_bytes(tile.token_tiles, tile.weight_tiles, tile.slices) +
           tile.slices * tile.depth * stage_bytes(tile.weight_tiles, group_size, rows);
}

// Rows of x that a block of threads has at most.
constexpr int tile_rows(const Int4Tile& tile, int64_t num_rows) {
    return num_rows < 8 * tile.token_tiles ? static_cast<int>(num_rows) : 8 * tile.token_tiles;
}

// What a choice depends on: bytes that a block may have, multiprocessors, compute capability's first number.
struct Int4Device {
    int limit, multiprocessors, major;
};

// The tile of a call on a device: the first one that is no larger than the rows want, as deep as leaves a
// multiprocessor two blocks, or one; less deep where all blocks are then at work at once. All zeros if none fits.
constexpr Int4Tile choose_tile(const Int4LinearCall& call, const Int4Device& device) {
    const bool gated = call.activation != Activation::none;
    const int wanted = call.num_rows <= 8 ? 1 : call.num_rows <= 16 ? 2 : 4;
    const int count = gated ? 3 : 4;
    for (int index = 0; index < count; ++index) {
        Int4Tile tile = gated ? kGatedTiles[index] : kPlainTiles[index];
        if (tile.token_tiles > wanted || tile.slices > num_slices(call.in_features)) continue;
        const int outs = kTile * tile.weight_tiles / (gated ? 2 : 1);
        const int64_t tiles = (call.out_features + outs - 1) / outs;
        const int64_t all = (call.num_rows + 8 * tile.token_tiles - 1) / (8 * tile.token_tiles) * tiles;
        // Of a multiprocessor; no more than registers suffice for.
        const int most = tile.token_tiles == 1 ? 4 : 2, needed = static_cast<int>(all / device.multiprocessors) + 1;
        for (int blocks = needed <= most ? needed : 2; blocks >= 1; --blocks) {
            for (tile.depth = 4; tile.depth >= 2; --tile.depth) {
                const int bytes = shared_bytes(tile, call.group_size, tile_rows(tile, call.num_rows));
                // The driver takes 1 KB of each block.
                if (bytes <= device.limit / blocks - 1024 * (blocks - 1)) return tile;
            }
        }
    }
    return {0, 0, 0, 0};
}

}  // namespace llama_fast
