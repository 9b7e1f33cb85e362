// The int4_linear kernel's instances, and their launch.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "int4_linear.h"

namespace llama_fast {

template <int TT, int WT, int P, bool GATED, int GROUP>
__global__ void __launch_bounds__(Int4Shape<TT, WT, P, GATED, GROUP>::threads,
                                  Int4Shape<TT, WT, P, GATED, GROUP>::blocks)
    int4_linear_kernel(const __grid_constant__ Int4LinearCall call) {
    extern __shared__ __align__(16) char shared[];
    int4_block<TT, WT, P, GATED, GROUP>(call, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

namespace {

struct Instance {
    int token_tiles, weight_tiles, slices;
    bool gated;
    int group_size;
    const void* kernel;
    int threads;
    int64_t (*blocks)(const Int4LinearCall&);
};

template <int TT, int WT, int P, bool GATED, int GROUP>
constexpr Instance instance() {
    using Shape = Int4Shape<TT, WT, P, GATED, GROUP>;
    const void* const kernel = reinterpret_cast<const void*>(&int4_linear_kernel<TT, WT, P, GATED, GROUP>);
    return {TT, WT, P, GATED, GROUP, kernel, Shape::threads, &int4_blocks<Shape>};
}

// kPlainTiles and kGatedTiles.
#define LLAMA_FAST_INSTANCES(group)                                                                            \
    instance<4, 4, 2, false, group>(), instance<2, 2, 4, false, group>(), instance<1, 1, 8, false, group>(),   \
        instance<1, 1, 4, false, group>(), instance<4, 4, 2, true, group>(), instance<2, 2, 4, true, group>(), \
        instance<1, 2, 4, true, group>()

const Instance kInstances[] = {LLAMA_FAST_INSTANCES(32), LLAMA_FAST_INSTANCES(64), LLAMA_FAST_INSTANCES(128)};

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

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return value;
}

Int4Device current_device() {
    int device = 0;
    check(cudaGetDevice(&device));
    return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrComputeCapabilityMajor, device)};
}

// Launches a kernel that may start before the stream's last one has ended, where the device can: it waits by itself.
void launch(const void* kernel, int64_t blocks, int threads, int bytes, bool early, void** arguments, void* stream) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    check(cudaLaunchKernelExC(&config, kernel, arguments));
    check(cudaGetLastError());
}

}  // namespace

void launch_int4_linear(const Int4LinearCall& call, void* stream) {
    const Int4Device device = current_device();
    const Int4Tile tile = choose_tile(call, device);
    const bool gated = call.activation != Activation::none;
    for (const Instance& found : kInstances) {
        if (found.token_tiles != tile.token_tiles || found.weight_tiles != tile.weight_tiles ||
            found.slices != tile.slices || found.gated != gated || found.group_size != call.group_size) {
            continue;
        }
        const int64_t blocks = found.blocks(call);
        if (blocks > INT32_MAX) throw std::invalid_argument(std::to_string(blocks) + " blocks exceed a CUDA grid");
        if (blocks == 0) return;
        Int4LinearCall copy = call;
        copy.depth = tile.depth;
        void* arguments[] = {&copy};
        // No work of a stream: it may stand inside a capture.
        check(cudaFuncSetAttribute(found.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.limit));
        const int bytes = shared_bytes(tile, call.group_size, tile_rows(tile, call.num_rows));
        launch(found.kernel, blocks, found.threads, bytes, device.major >= 9, arguments, stream);
        return;
    }
    throw std::invalid_argument("no kernel of groups of " + std::to_string(call.group_size) + " fits " +
                                std::to_string(device.limit) + " bytes of shared memory");
}

void load_kernels() {
    for (const Instance& instance : kInstances) {
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, instance.kernel));
    }
}

}  // namespace llama_fast
