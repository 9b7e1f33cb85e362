// The int4_linear kernel on a CPU, for ctypes: csrc/cuda/int4_linear.h with emulated_cuda.h in place of device.h.
#include <functional>

#include "int4_linear.h"

using namespace llama_fast;

namespace {

std::function<void(int)> thread_of_block;

// From `first` (from the end if negative) `count` blocks, or all that follow if that is negative.
struct Blocks {
    int64_t first, count;
};

template <int TT, int WT, int P, bool GATED, int GROUP>
bool run(const Int4LinearCall& call, const Int4Tile& tile, Blocks blocks) {
    using Shape = Int4Shape<TT, WT, P, GATED, GROUP>;
    const int bytes = shared_bytes(tile, GROUP, tile_rows(tile, call.num_rows));
    const int64_t all = int4_blocks<Shape>(call), first = blocks.first < 0 ? all + blocks.first : blocks.first;
    const int64_t end = blocks.count < 0 ? all : first + blocks.count;
    auto& machine = emulated::machine();
    for (int64_t block = first; block < end; ++block) {
        thread_of_block = [&](int thread) {
            char* const shared = reinterpret_cast<char*>(machine.shared.data());
            int4_block<TT, WT, P, GATED, GROUP>(call, static_cast<unsigned>(block), thread, shared);
        };
        if (!machine.run(Shape::threads, bytes, [](int thread) { thread_of_block(thread); })) return false;
    }
    return true;
}

template <int GROUP>
bool run(const Int4LinearCall& call, const Int4Tile& tile, Blocks blocks) {
    const bool gated = call.activation != Activation::none;
    switch (1000 * gated + 100 * tile.token_tiles + 10 * tile.weight_tiles + tile.slices) {
        case 114:
            return run<1, 1, 4, false, GROUP>(call, tile, blocks);
        case 224:
            return run<2, 2, 4, false, GROUP>(call, tile, blocks);
#ifndef LLAMA_FAST_FEW_TILES  // compiles sooner
        case 118:
            return run<1, 1, 8, false, GROUP>(call, tile, blocks);
        case 442:
            return run<4, 4, 2, false, GROUP>(call, tile, blocks);
        case 1124:
            return run<1, 2, 4, true, GROUP>(call, tile, blocks);
        case 1224:
            return run<2, 2, 4, true, GROUP>(call, tile, blocks);
        case 1442:
            return run<4, 4, 2, true, GROUP>(call, tile, blocks);
#endif
        default:
            emulated::machine().problem = "no such tile";
            return false;
    }
}

}  // namespace

extern "C" {

// As llama_fast._cuda.int4_linear, of some blocks (from the end if negative); null or what went wrong. Only the
// operands' own bytes may be touched. `tile` is an Int4Tile.
const char* emulated_int4_linear(const uint16_t* x, int64_t x_stride, int64_t num_rows, const uint32_t* words,
                                 const uint16_t* scales, const uint16_t* zeros, const uint16_t* bias,
                                 const uint16_t* residual, void* out, int64_t out_features, int in_features,
                                 int group_size, int activation, int out_is_float, const int* tile, int64_t first_block,
                                 int64_t num_blocks) {
    const Int4LinearCall call{x,
                              words,
                              scales,
                              zeros,
                              bias,
                              residual,
                              out,
                              x_stride,
                              num_rows,
                              out_features,
                              in_features,
                              group_size,
                              static_cast<Activation>(activation),
                              out_is_float != 0,
                              tile[3]};
    const int64_t weight_rows = call.activation != Activation::none ? 2 * out_features : out_features;
    const int64_t blocks = (in_features + kBlock - 1) / kBlock, groups = in_features / group_size;
    auto& ranges = emulated::machine().ranges;
    ranges.clear();
    const auto allow = [&](const void* begin, int64_t bytes, bool writable = false) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
        if (begin != nullptr) ranges.push_back({address, address + bytes, writable});
    };
    emulated::machine().of_earlier = {x, residual};
    allow(x, 2 * ((num_rows - 1) * x_stride + in_features));
    allow(words, 4 * blocks * weight_rows * kWords);
    allow(scales, 2 * groups * weight_rows);
    allow(zeros, 2 * groups * weight_rows);
    allow(bias, 2 * weight_rows);
    allow(residual, 2 * num_rows * out_features);
    allow(out, (out_is_float ? 4 : 2) * num_rows * out_features, true);
    const Int4Tile chosen{tile[0], tile[1], tile[2], tile[3]};
    const Blocks some{first_block, num_blocks};
#ifdef LLAMA_FAST_FEW_TILES
    const bool fine = run<64>(call, chosen, some);
#else
    const bool fine = group_size == 32   ? run<32>(call, chosen, some)
                      : group_size == 64 ? run<64>(call, chosen, some)
                                         : run<128>(call, chosen, some);
#endif
    return fine ? nullptr : emulated::machine().problem.c_str();
}

// What the launcher would choose on a device, whose Int4Device is given; returns the bytes that it takes.
int emulated_tile(int64_t num_rows, int64_t out_features, int in_features, int group_size, int gated, const int* device,
                  int* tile) {
    Int4LinearCall call{};
    call.num_rows = num_rows;
    call.out_features = out_features;
    call.in_features = in_features;
    call.group_size = group_size;
    call.activation = gated ? Activation::silu : Activation::none;
    const Int4Tile chosen = choose_tile(call, {device[0], device[1], device[2]});
    tile[0] = chosen.token_tiles;
    tile[1] = chosen.weight_tiles;
    tile[2] = chosen.slices;
    tile[3] = chosen.depth;
    return chosen.token_tiles == 0 ? 0 : shared_bytes(chosen, group_size, tile_rows(chosen, num_rows));
}
}
