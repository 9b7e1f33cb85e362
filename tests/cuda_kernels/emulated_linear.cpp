// The linear kernel on a CPU, for ctypes: csrc/cuda/linear.h with emulated_cuda.h in place of device.h.
#include <algorithm>
#include <functional>
#include <limits>

#include "linear.h"

using namespace llama_fast;

namespace {

std::function<void(int)> thread_of_block;

// From `first` (from the end if negative) `count` blocks, or all that follow if that is negative.
struct Blocks {
    int64_t first, count;
};

template <int TT, int WT, bool GATED>
bool run(const LinearCall& call, Blocks blocks) {
    using Shape = LinearShape<TT, WT, GATED>;
    LinearSums<Shape> sums;
    float* values = &sums.values[0][0][0];
    const int64_t all = linear_blocks<Shape>(call), first = blocks.first < 0 ? all + blocks.first : blocks.first;
    const int64_t end = blocks.count < 0 ? all : first + blocks.count;
    for (int64_t block = first; block < end; ++block) {
        std::fill(values, values + sizeof(sums) / sizeof(float), std::numeric_limits<float>::quiet_NaN());
        thread_of_block = [&](int thread) {
            linear_block<TT, WT, GATED>(call, static_cast<unsigned>(block), thread, sums);
        };
        if (!emulated::machine().run(kThreads, [](int thread) { thread_of_block(thread); })) return false;
    }
    return true;
}

template <int WT, bool GATED>
bool run(const LinearCall& call, int token_tiles, Blocks blocks) {
#ifdef LLAMA_FAST_FEW_TILES  // compiles sooner
    return token_tiles == 1 ? run<1, 1, GATED>(call, blocks) : run<2, 1, GATED>(call, blocks);
#else
    switch (token_tiles) {
        case 1:
            return run<1, WT, GATED>(call, blocks);
        case 2:
            return run<2, WT, GATED>(call, blocks);
        case 4:
            return run<4, WT, GATED>(call, blocks);
        default:
            return run<8, WT, GATED>(call, blocks);
    }
#endif
}

}  // namespace

extern "C" {

// As llama_fast._cuda.linear, of some blocks (from the end if negative); null or what went wrong. Only the operands'
// own bytes may be touched.
const char* emulated_linear(const uint16_t* x, int64_t x_stride, int64_t num_rows, const uint16_t* weight,
                            const uint16_t* bias, const uint16_t* residual, void* out, int64_t out_features,
                            int in_features, int activation, int out_is_float, int token_tiles, int weight_tiles,
                            int64_t first_block, int64_t num_blocks) {
    const LinearCall call{x,
                          weight,
                          bias,
                          residual,
                          out,
                          x_stride,
                          num_rows,
                          out_features,
                          in_features,
                          static_cast<Activation>(activation),
                          out_is_float != 0};
    const bool gated = call.activation != Activation::none;
    if (token_tiles == 0) {
        const LinearTile tile = choose_tile(num_rows, out_features, gated);
        token_tiles = tile.token_tiles;
        weight_tiles = tile.weight_tiles;
    }
    const int64_t weight_rows = gated ? 2 * out_features : out_features;
    auto& ranges = emulated::machine().ranges;
    ranges.clear();
    const auto allow = [&](const void* begin, int64_t bytes, bool writable = false) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
        if (begin != nullptr) ranges.push_back({address, address + bytes, writable});
    };
    allow(x, 2 * ((num_rows - 1) * x_stride + in_features));
    allow(weight, 2 * weight_rows * in_features);
    allow(bias, 2 * weight_rows);
    allow(residual, 2 * num_rows * out_features);
    allow(out, (out_is_float ? 4 : 2) * num_rows * out_features, true);
    const Blocks blocks{first_block, num_blocks};
    const bool fine = gated               ? run<1, true>(call, token_tiles, blocks)
                      : weight_tiles == 2 ? run<2, false>(call, token_tiles, blocks)
                                          : run<1, false>(call, token_tiles, blocks);
    return fine ? nullptr : emulated::machine().problem.c_str();
}

void emulated_tile(int64_t num_rows, int64_t out_features, int gated, int* tiles) {
    const LinearTile tile = choose_tile(num_rows, out_features, gated != 0);
    tiles[0] = tile.token_tiles;
    tiles[1] = tile.weight_tiles;
}
}
