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

template <class T>
const T* at(Address address) {
    return reinterpret_cast<const T*>(address);
}

void int4_linear(Address x, int64_t x_stride, int64_t num_rows, Address words, Address scales, Address zeros,
                 Address bias, Address residual, Address out, int64_t out_features, int in_features, int group_size,
                 int activation, bool out_is_float, Address stream) {
    const Int4LinearCall call{at<uint16_t>(x),
                              at<uint32_t>(words),
                              at<uint16_t>(scales),
                              at<uint16_t>(zeros),
                              at<uint16_t>(bias),
                              at<uint16_t>(residual),
                              reinterpret_cast<void*>(out),
                              x_stride,
                              num_rows,
                              out_features,
                              in_features,
                              group_size,
                              static_cast<Activation>(activation),
                              out_is_float,
                              0};
    launch_int4_linear(call, reinterpret_cast<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of llama_fast; use them through llama_fast.ops.cuda_extension.";

    // llama_fast/ops/cuda_extension.py refuses another number: change both with any change of a signature.
    module.attr("interface") = 2;
    module.attr("source_hash") = LLAMA_FAST_TEXT_OF(LLAMA_FAST_SOURCE_HASH);
    // Compute capabilities times ten: machine code for each, and PTX of the last.
    module.attr("architectures") = std::vector<int>{LLAMA_FAST_CUDA_ARCHITECTURES};
    module.def("load", &load_kernels, "Load all kernels onto the current device; RuntimeError if that fails.");
    module.def(
        "int4_linear", &int4_linear, py::arg("x"), py::arg("x_stride"), py::arg("num_rows"), py::arg("words"),
        py::arg("scales"), py::arg("zeros"), py::arg("bias"), py::arg("residual"), py::arg("out"),
        py::arg("out_features"), py::arg("in_features"), py::arg("group_size"), py::arg("activation"),
        py::arg("out_is_float"), py::arg("stream"),
        "Launch x times an int4 weight's transpose on a stream; csrc/cuda/int4_linear_call.h tells what addresses "
        "hold. RuntimeError with CUDA's error; ValueError for a group size that does not exist.");
}
