// The linear kernel's instances, and their launch.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "linear.h"

namespace llama_fast {

template <int TT, int WT, bool GATED>
__global__ void __launch_bounds__(kThreads, LinearShape<TT, WT, GATED>::blocks)
    linear_kernel(const __grid_constant__ LinearCall call) {
    __shared__ LinearSums<LinearShape<TT, WT, GATED>> sums;
    linear_block<TT, WT, GATED>(call, blockIdx.x, static_cast<int>(threadIdx.x), sums);
}

namespace {

struct Instance {
    int token_tiles, weight_tiles;
    bool gated;
    const void* kernel;
    int64_t (*blocks)(const LinearCall&);
};

template <int TT, int WT, bool GATED>
constexpr Instance instance() {
    return {TT, WT, GATED, reinterpret_cast<const void*>(&linear_kernel<TT, WT, GATED>),
            &linear_blocks<LinearShape<TT, WT, GATED>>};
}

const Instance kInstances[] = {
    instance<1, 1, false>(), instance<2, 1, false>(), instance<4, 1, false>(), instance<8, 1, false>(),
    instance<1, 2, false>(), instance<2, 2, false>(), instance<4, 2, false>(), instance<8, 2, false>(),
    instance<1, 1, true>(),  instance<2, 1, true>(),  instance<4, 1, true>(),  instance<8, 1, true>(),
};

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the next call's result is its own
    std::string problem = "CUDA error " + std::to_string(static_cast<int>(error)) + " (" + cudaGetErrorName(error) +
                          ": " + cudaGetErrorString(error) + ")";
    if (error == cudaErrorInsufficientDriver) {
        problem += "; install an NVIDIA driver, or a newer one, or set LLAMA_FAST_CUDA_EXTENSION=off";
    } else if (error == cudaErrorNoDevice) {
        problem += "; no NVIDIA GPU is visible to this process";
    } else if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
        problem +=
            "; llama_fast._cuda was built without this GPU's architecture: install llama_fast again with "
            "LLAMA_FAST_CUDA_ARCHS set to it, or set LLAMA_FAST_CUDA_EXTENSION=off";
    }
    throw std::runtime_error(problem);
}

}  // namespace

void launch_linear(const LinearCall& call, LinearTile tile, void* stream) {
    const bool gated = call.activation != Activation::none;
    if (tile.token_tiles == 0 && tile.weight_tiles == 0) tile = choose_tile(call.num_rows, call.out_features, gated);
    for (const Instance& found : kInstances) {
        if (found.token_tiles != tile.token_tiles || found.weight_tiles != tile.weight_tiles || found.gated != gated) {
            continue;
        }
        const int64_t blocks = found.blocks(call);
        if (blocks > INT32_MAX) throw std::invalid_argument(std::to_string(blocks) + " blocks exceed a CUDA grid");
        if (blocks == 0) return;
        LinearCall copy = call;
        void* arguments[] = {&copy};
        check(cudaLaunchKernel(found.kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0,
                               static_cast<cudaStream_t>(stream)));
        check(cudaGetLastError());
        return;
    }
    throw std::invalid_argument("no kernel of " + std::to_string(tile.token_tiles) + " token tiles and " +
                                std::to_string(tile.weight_tiles) + " weight tiles" +
                                (gated ? " with an activation" : ""));
}

void load_kernels() {
    for (const Instance& instance : kInstances) {
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, instance.kernel));
    }
}

}  // namespace llama_fast
