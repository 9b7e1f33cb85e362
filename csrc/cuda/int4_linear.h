// int4_linear for generated rows: x in bf16 times the transpose of a weight of 4-bit integers, with the epilogues of
// kernels/int4_linear.py and on its own packing, so that both kernels share one copy of the weight.
//
// Traffic  Weight once up to 32 rows: memory-bound. Every block reads x, from L2, into shared memory. Not measured yet.
// Operands The weight is the matrix instruction's A, 16 output features high, the tokens its B, eight wide: a column of
//          an instruction is a token, and no column sees another. Word i of a row's 16 has in its nibble j the input
//          feature 16 j + i of a block of 128. A lane (group = lane / 4, quad = lane % 4) loads the words 4 quad to
//          4 quad + 3 of rows group and group + 8, so a warp's load is 512 neighbouring bytes, and nibble j of them is
//          the A of instruction j, if its 16 products are taken in another order, the same for x: where it wants
//          k = 2 quad, 2 quad + 1, 2 quad + 8 and 2 quad + 9 it gets 4 quad to 4 quad + 3, eight bytes of a token.
// Unpacking  Two words' halves side by side; shifted, masked and with an exponent beside it a nibble is 128 + value in
//          bf16, less 128 + zero an integer: all exact. 1.5 instructions a weight.
// Sums     A group's products are summed from zero; one fused multiply-add with the scale takes the group into its
//          slice's sum, groups ascending. Slices of whole blocks (num_slices) are added in ascending order. So a row's
//          bits depend on nothing but the row, the weight and the epilogue: neither on the number of rows, nor on a
//          row's place, nor on the tile.
// Copies   A warp works on one tile of 16 weight rows and one slice, step by step of 256 input features. Words, scales
//          and zeros of its next steps are on their way to shared memory, in a ring of `depth` stages, and x, which the
//          warps of a slice share; only these wait for each other. Registers hold a step alone.
// Rounding As kernels/int4_linear.py: bias in fp32; the projection to bf16 before a residual is added, gate and up to
//          bf16 before the activation.
// Source   PTX ISA, "Matrix Fragments for mma.m16n8k16" (device.h).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#include "device.h"
#else
#include "emulated_cuda.h"
#endif
#include "int4_linear_call.h"

namespace llama_fast {

constexpr int kLanes = 32, kPlanes = 8;

// Int4Tile's token tiles, weight tiles and slices: a warp for each weight tile and slice. GATED: half of the weight
// tiles are gate's, the others up's. Groups of GROUP input features.
template <int TT, int WT, int P, bool GATED, int GROUP>
struct Int4Shape {
    static constexpr int tokens = 8 * TT, width = kTile * WT, outs = GATED ? width / 2 : width;
    static constexpr int weight_tiles = WT, slices = P, slice_threads = kLanes * WT, threads = P * slice_threads;
    static constexpr int group_size = GROUP, groups = kBlock / GROUP;  // of a block
    // Blocks of threads of a multiprocessor that the registers suffice for; shared memory decides how many there are.
    static constexpr int blocks = TT == 4 || (TT == 2 && GROUP == 32) ? 1 : 512 / threads;
    // Outputs that a thread finishes, and sums of each.
    static constexpr int each = (tokens * outs + threads - 1) / threads, parts = GATED ? 2 : 1;
};

// Where a slice begins and ends, in steps.
struct Steps {
    int begin, end;

    __device__ __forceinline__ Steps(int in_features, int slice) {
        const int steps = (in_features + kStep - 1) / kStep, slices = num_slices(in_features);
        const int length = (steps + slices - 1) / slices;
        begin = slice * length < steps ? slice * length : steps;
        end = begin + length < steps ? begin + length : steps;
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

// What a warp works on.
struct Int4Work {
    int64_t first_token, first_weight_row, last_weight_row, weight_rows;
    int tile, place;  // of the weight tiles; of the slices at a time
    int lane;
    int rows;  // of x
};

// Copies the steps of a warp's slices, one after the other, into a ring of stages.
template <class Shape>
struct Int4Copier {
    // A warp has the numbers of four groups at a time, eight lanes of each.
    static constexpr int kGroups = kStepBlocks * Shape::groups, kPasses = (kGroups + 3) / 4;
    static constexpr int kPieces = Shape::tokens / Shape::weight_tiles;

    const Int4LinearCall& call;
    const Int4Work& work;
    const int stage_bytes, ring_bytes;
    const Shared tile, x_tile;
    const uint64_t policy = words_policy();
    int slice, step, end, to = 0;
    // Of this lane, in the next step.
    const uint32_t* words;
    const bfloat16 *scales, *zeros, *x;
    int high_words, row_step, left;  // left: features from the step's first on

    __device__ __forceinline__ Int4Copier(const Int4LinearCall& call, const Int4Work& work, Shared ring)
        : call(call),
          work(work),
          stage_bytes(llama_fast::stage_bytes(Shape::weight_tiles, Shape::group_size, work.rows)),
          ring_bytes(call.depth * stage_bytes),
          tile(ring + work.tile * tile_bytes(Shape::group_size)),
          x_tile(ring + Shape::weight_tiles * tile_bytes(Shape::group_size)),
          slice(work.place) {
        high_words = static_cast<int>(weight_row(work.lane / 4 + 8) - weight_row(work.lane / 4)) * kWords;
        row_step = static_cast<int>(Shape::weight_tiles * call.x_stride);
        start_slice();
    }

    // Weight rows past the last one are read as the last one, and stored nowhere.
    __device__ __forceinline__ int64_t weight_row(int row) const {
        const int64_t wanted = work.first_weight_row + row;
        return wanted < work.last_weight_row ? wanted : work.last_weight_row;
    }

    __device__ __forceinline__ void start_slice() {
        const Steps steps(call.in_features, slice);
        step = steps.begin;
        end = steps.end;
        left = call.in_features - step * kStep;
        const int64_t block = static_cast<int64_t>(step) * kStepBlocks;
        words = call.words + (block * work.weight_rows + weight_row(work.lane / 4)) * kWords + 4 * (work.lane % 4);
        // There is an even number of outputs, so two numbers are there or not.
        const int64_t group = block * Shape::groups + work.lane / 8;
        const int64_t number = group * work.weight_rows + weight_row(2 * (work.lane % 8) + 1) - 1;
        scales = call.scales + number;
        if (call.zeros != nullptr) zeros = call.zeros + number;
        x = call.x + (work.first_token + work.tile) * call.x_stride + step * kStep + 8 * work.lane;
    }

    // The first steps, whose words no earlier kernel writes: they are on their way while those end.
    __device__ __forceinline__ void first_steps() {
#pragma unroll 1
        for (int stage = 0; stage < call.depth - 1; ++stage) next<true, false>();
        wait_for_earlier_kernels();
        let_later_kernels_start();
        slice = work.place;
        to = 0;
        start_slice();
        // The first of these batches has all the words.
#pragma unroll 1
        for (int stage = 0; stage < call.depth - 1; ++stage) {
            next<false, true>();
            commit_copies();
        }
    }

    // The next step, if there is one. Features and groups past the last are zeros.
    template <bool WORDS, bool X>
    __device__ __forceinline__ void next() {
        if (step < end) {
            if (WORDS) copy_weight();
            if (X) copy_rows();
            words += kStepBlocks * work.weight_rows * kWords;
            scales += kGroups * work.weight_rows;
            zeros += kGroups * work.weight_rows;
            x += kStep;
            left -= kStep;
            to += stage_bytes;
            if (to == ring_bytes) to = 0;
            const bool last = ++step == end;
            if (Shape::slices < kMostSlices && last && slice + Shape::slices < num_slices(call.in_features)) {
                slice += Shape::slices;
                start_slice();
            }
        }
    }

    __device__ __forceinline__ void copy_weight() {
        const Shared words_to = tile + to + 16 * work.lane;
        const int64_t block_words = work.weight_rows * kWords;
#pragma unroll
        for (int block = 0; block < kStepBlocks; ++block) {
            const bool inside = block * kBlock < left;
            const uint32_t* const low = words + block * block_words;
            copy_words(words_to + block * kBlockBytes, low, inside, policy);
            copy_words(words_to + block * kBlockBytes + kBlockBytes / 2, low + high_words, inside, policy);
        }
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int group = 4 * pass + work.lane / 8;
            if (group >= kGroups) break;
            const Shared numbers_to = tile + to + kWordsBytes + 2 * group * kTile + 4 * (work.lane % 8);
            const bool inside = group * Shape::group_size < left;
            const int64_t ahead = 4 * pass * work.weight_rows;
            copy_numbers(numbers_to, scales + ahead, inside);
            if (call.zeros != nullptr)
                copy_numbers(numbers_to + scales_bytes(Shape::group_size), zeros + ahead, inside);
        }
    }

    __device__ __forceinline__ void copy_rows() {
        // The warps of a slice take the rows of x in turn.
        const Shared x_to = x_tile + to + work.tile * kPitch + 16 * work.lane;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            if (work.tile + piece * Shape::weight_tiles >= work.rows) break;
            copy_x(x_to + piece * Shape::weight_tiles * kPitch, x + piece * row_step, 8 * work.lane < left);
        }
    }
};

// Waits until the oldest of `depth` - 1 batches of copies is there.
__device__ __forceinline__ void wait_for_oldest(int depth) {
    if (depth == 2) {
        wait_for_copies<0>();
    } else if (depth == 3) {
        wait_for_copies<1>();
    } else {
        wait_for_copies<2>();
    }
}

// Adds a step of a weight tile to its slice's sum, acc[n][i] of token tile n where the matrix instruction has it.
// Addresses are this lane's: of its words, of its rows' scales, of its part of each token tile.
template <class Shape, int TT>
__device__ __forceinline__ void add_step(Shared words_from, Shared numbers_from, const Shared (&x_from)[TT],
                                         bool has_zeros, float (&acc)[TT][4]) {
    constexpr int kGroupPlanes = kPlanes / Shape::groups;
#pragma unroll
    for (int block = 0; block < kStepBlocks; ++block) {
        const Vector low = load_words(words_from + block * kBlockBytes);
        const Vector high = load_words(words_from + block * kBlockBytes + kBlockBytes / 2);
        const uint32_t halves[2][4] = {{lower_halves(low.x, low.y), lower_halves(high.x, high.y),
                                        lower_halves(low.z, low.w), lower_halves(high.z, high.w)},
                                       {upper_halves(low.x, low.y), upper_halves(high.x, high.y),
                                        upper_halves(low.z, low.w), upper_halves(high.z, high.w)}};
#pragma unroll
        for (int g = 0; g < Shape::groups; ++g) {
            // Of rows group and group + 8: the scales, and what to add for 128 + value - (128 + zero).
            const Shared scales_from = numbers_from + 2 * (block * Shape::groups + g) * kTile;
            const float scale[2] = {load_number(scales_from), load_number(scales_from + 16)};
            uint32_t less[2] = {twice(-136.0f), twice(-136.0f)};
            if (has_zeros) {
                less[0] = twice(-128.0f - load_number(scales_from + scales_bytes(Shape::group_size)));
                less[1] = twice(-128.0f - load_number(scales_from + scales_bytes(Shape::group_size) + 16));
            }
            float sums[TT][4] = {};
#pragma unroll
            for (int plane = g * kGroupPlanes; plane < (g + 1) * kGroupPlanes; ++plane) {
                uint32_t a[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    a[i] = add_halves(lowest_nibbles(halves[plane / 4][i] >> (4 * (plane % 4))), less[i % 2]);
                }
#pragma unroll
                for (int n = 0; n < TT; ++n) {
                    const Pair b = load_x(x_from[n] + 2 * (kBlock * block + 16 * plane));
                    matrix_multiply(sums[n], a[0], a[1], a[2], a[3], b.x, b.y);
                }
            }
#pragma unroll
            for (int n = 0; n < TT; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[n][i] = multiply_add(sums[n][i], scale[i / 2], acc[n][i]);
            }
        }
    }
}

// A thread's part of block `block` of int4_blocks(); `shared` is the block's memory, shared_bytes().
template <int TT, int WT, int P, bool GATED, int GROUP>
__device__ __forceinline__ void int4_block(const Int4LinearCall& call, unsigned block, int thread, char* shared) {
    using Shape = Int4Shape<TT, WT, P, GATED, GROUP>;
    constexpr int kGateTiles = Shape::outs / kTile;
    const int lane = thread % kLanes, tile = thread / kLanes % WT, place = thread / Shape::slice_threads;
    const int group = lane / 4, quad = lane % 4;
    // Blocks that share a tile of the weight are neighbours, so that L2 serves all but the first.
    const unsigned passes = static_cast<unsigned>((call.num_rows + Shape::tokens - 1) / Shape::tokens);
    const int64_t first_out = static_cast<int64_t>(block / passes) * Shape::outs;
    const int64_t first_token = static_cast<int64_t>(block % passes) * Shape::tokens;
    const int64_t before = GATED && tile >= kGateTiles ? call.out_features : 0;
    const int64_t rows_left = call.num_rows - first_token;
    const int rows = static_cast<int>(rows_left < Shape::tokens ? rows_left : Shape::tokens);
    const Int4Work work{first_token,
                        before + first_out + kTile * (tile % kGateTiles),
                        before + call.out_features - 1,
                        Shape::parts * call.out_features,
                        tile,
                        place,
                        lane,
                        rows};

    const int ring_bytes = call.depth * stage_bytes(WT, GROUP, rows);
    const Shared ring = in_shared(shared) + sums_bytes(TT, WT, P) + place * ring_bytes;
    Int4Copier<Shape> copier(call, work, ring);
    copier.first_steps();
    // Rows of x past the last are read as the last.
    Shared x_from[TT];
#pragma unroll
    for (int n = 0; n < TT; ++n) {
        const int row = 8 * n + group < rows ? 8 * n + group : rows - 1;
        x_from[n] = copier.x_tile + row * kPitch + 8 * quad;
    }
    Shared stage_from = 0;
    float* const sums = reinterpret_cast<float*>(shared);
    const auto sum = [&](int p, int token, int weight_row) -> float& {
        return sums[(p * Shape::tokens + token) * sums_pitch(WT) + weight_row];
    };
    float total[Shape::each][Shape::parts] = {};
    for (int first = 0; first < num_slices(call.in_features); first += P) {
        const Steps steps(call.in_features, first + place);
        float acc[TT][4] = {};
        for (int step = steps.begin; step < steps.end; ++step) {
            wait_for_oldest(call.depth);
            // What the others copied is seen, and all have read the stage that is copied over next.
            barrier_among(place, Shape::slice_threads);
            copier.template next<true, true>();
            commit_copies();
            Shared x_now[TT];
#pragma unroll
            for (int n = 0; n < TT; ++n) x_now[n] = x_from[n] + stage_from;
            add_step<Shape, TT>(copier.tile + stage_from + 16 * lane,
                                copier.tile + stage_from + kWordsBytes + 2 * group, x_now, call.zeros != nullptr, acc);
            stage_from += copier.stage_bytes;
            if (stage_from == static_cast<Shared>(ring_bytes)) stage_from = 0;
        }
        if (first > 0) barrier();  // the sums of earlier slices are read
#pragma unroll
        for (int n = 0; n < TT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum(place, 8 * n + 2 * quad + i % 2, kTile * tile + 8 * (i / 2) + group) = acc[n][i];
            }
        }
        barrier();
#pragma unroll
        for (int e = 0; e < Shape::each; ++e) {
            const int index = thread + e * Shape::threads, token = index / Shape::outs, out = index % Shape::outs;
            if (token >= Shape::tokens) break;
#pragma unroll
            for (int part = 0; part < Shape::parts; ++part) {
#pragma unroll
                for (int p = 0; p < P; ++p) total[e][part] += sum(p, token, Shape::outs * part + out);
            }
        }
    }

#pragma unroll
    for (int e = 0; e < Shape::each; ++e) {
        const int index = thread + e * Shape::threads, token = index / Shape::outs;
        const int64_t row = first_token + token, out = first_out + index % Shape::outs;
        if (token >= Shape::tokens || row >= call.num_rows || out >= call.out_features) continue;
        const int64_t at = row * call.out_features + out;
        float y = total[e][0];
        if (call.bias != nullptr) y += load_float(call.bias + out);
        if constexpr (GATED) {
            float up = total[e][1];
            if (call.bias != nullptr) up += load_float(call.bias + call.out_features + out);
            y = activated(widened(rounded(y)), call.activation) * widened(rounded(up));
        } else if (call.residual != nullptr) {
            y = widened(rounded(y)) + load_float(call.residual + at);
        }
        if (call.out_is_float) {
            store(static_cast<float*>(call.out) + at, y);
        } else {
            store(static_cast<bfloat16*>(call.out) + at, rounded(y));
        }
    }
}

// Blocks of a call.
template <class Shape>
int64_t int4_blocks(const Int4LinearCall& call) {
    return (call.num_rows + Shape::tokens - 1) / Shape::tokens * ((call.out_features + Shape::outs - 1) / Shape::outs);
}

}  // namespace llama_fast
