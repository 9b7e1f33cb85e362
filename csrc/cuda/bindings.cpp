// llama_fast._cuda: CUDA kernels. Addresses, sizes and the stream come as integers, so that no header of torch, and
// none of its binary interfaces, is needed; llama_fast/ops/cuda_extension.py checks tensors and knows what an address
// must hold. The CUDA runtime is linked in, and looks for a driver only when a kernel is launched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "launch.h"

#define LLAMA_FAST_TEXT(text) #text
#define LLAMA_FAST_TEXT_OF(macro) LLAMA_FAST_TEXT(macro)

namespace py = pybind11;
using namespace llama_fast;

namespace {

using Address = uintptr_t;

const uint16_t* at(Address address) { return reinterpret_cast<const uint16_t*>(address); }

void linear(Address x, int64_t x_stride, int64_t num_rows, Address weight, Address bias, Address residual, Address out,
            int64_t out_features, int in_features, int activation, bool out_is_float, Address stream, int token_tiles,
            int weight_tiles) {
    const LinearCall call{at(x),       at(weight), at(bias),     at(residual), reinterpret_cast<void*>(out),
                          x_stride,    num_rows,   out_features, in_features,  static_cast<Activation>(activation),
                          out_is_float};
    launch_linear(call, {token_tiles, weight_tiles}, reinterpret_cast<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of llama_fast; use them through llama_fast.ops.cuda_extension.";

    // llama_fast/ops/cuda_extension.py refuses another number: change both with any change of a signature.
    module.attr("interface") = 1;
    module.attr("source_hash") = LLAMA_FAST_TEXT_OF(LLAMA_FAST_SOURCE_HASH);
    // Compute capabilities times ten: machine code for each, and PTX of the last.
    module.attr("architectures") = std::vector<int>{LLAMA_FAST_CUDA_ARCHITECTURES};
    module.def("load", &load_kernels, "Load all kernels onto the current device; RuntimeError if that fails.");
    module.def("linear", &linear, py::arg("x"), py::arg("x_stride"), py::arg("num_rows"), py::arg("weight"),
               py::arg("bias"), py::arg("residual"), py::arg("out"), py::arg("out_features"), py::arg("in_features"),
               py::arg("activation"), py::arg("out_is_float"), py::arg("stream"), py::arg("token_tiles") = 0,
               py::arg("weight_tiles") = 0,
               "Launch x times the weight's transpose on a stream; csrc/cuda/linear_call.h tells what addresses hold. "
               "RuntimeError with CUDA's error; ValueError for a tile that does not exist.");
}
