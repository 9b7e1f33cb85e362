// llama_fast._C: the native CPU kernels. Addresses and sizes come as integers, so that no header of torch, and none of
// its binary interfaces, is needed; llama_fast/ops/cpu.py checks tensors and knows what an address must hold.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "cpu/advance.h"
#include "cpu/calls.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;
using namespace llama_fast;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// A decoder layer's weights; the objects they come from outlive it (llama_fast/ops/cpu_layers.py holds them).
struct Layer {
    const LinearWeight *qkv, *o, *gate_up, *down;
    Norm attention_norm, mlp_norm;
    Activation activation;
};

// Memory between the kernels of a layer: the calling thread's, kept from call to call.
class Workspace {
   public:
    char* take(int64_t bytes) {
        const int64_t start = used_;
        used_ += (bytes + 63) / 64 * 64;
        return base_ == nullptr ? nullptr : base_ + start;
    }
    // Room for what was taken so far, from the start; uninitialised.
    void provide() {
        if (used_ > size_) {
            memory_.reset(new char[used_ + 64]);
            size_ = used_;
        }
        base_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
        used_ = 0;
    }
    void start() {
        base_ = nullptr;
        used_ = 0;
    }

   private:
    std::unique_ptr<char[]> memory_;
    char* base_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};

Workspace& workspace() {
    thread_local Workspace space;
    return space;
}

struct Rotation {
    const float *cos, *sin;
    int64_t dim;
};

// RMSNorm, q, k, v, RoPE, cache write; `packed` is where q, k and v lie in between.
void norm_qkv_rope_cache(const LinearWeight& weight, const void* x, int64_t x_stride, Norm norm, int64_t num_heads,
                         const Rotation& rotation, const Places& places, const Pages& pages, char* packed, void* q_out,
                         int num_threads) {
    const int64_t row = weight.out_features(), item = item_size(weight.dtype);
    char* k = packed + num_heads * pages.head_dim * item;
    char* v = k + pages.num_kv_heads * pages.head_dim * item;
    LinearCall linear{&weight, x, x_stride, places.num_tokens, norm};
    linear.out = packed;
    linear.num_threads = num_threads;
    kernels().linear(linear);
    kernels().rope_and_cache({weight.dtype, packed, k, v, row, row, row, num_heads, rotation.cos, rotation.sin,
                              rotation.dim, places, pages, q_out, num_threads});
}

// The five ops of each layer (llama_fast/model/llama.py) on x [num_tokens, hidden_size], in place.
void run_layers(const std::vector<const Layer*>& layers, const std::vector<const Pages*>& pages, void* x,
                int64_t num_heads, int64_t split_size, const Rotation& rotation, const Places& places,
                int num_threads) {
    const int64_t tokens = places.num_tokens;
    for (size_t index = 0; index < layers.size(); ++index) {
        const Layer& layer = *layers[index];
        const DType dtype = layer.qkv->dtype;
        const int64_t item = item_size(dtype), hidden = layer.qkv->in_features, inner = layer.down->in_features;
        const int64_t attended = num_heads * pages[index]->head_dim;
        Workspace& space = workspace();
        char *packed, *q, *attention, *gated;
        for (const bool measured : {false, true}) {
            measured ? space.provide() : space.start();
            packed = space.take(tokens * layer.qkv->out_features() * item);
            q = space.take(tokens * attended * item);
            attention = space.take(tokens * attended * item);
            gated = space.take(tokens * inner * item);
        }
        norm_qkv_rope_cache(*layer.qkv, x, hidden, layer.attention_norm, num_heads, rotation, places, *pages[index],
                            packed, q, num_threads);
        kernels().attention({dtype, q, attended, num_heads, split_size, places, *pages[index], attention, num_threads});
        LinearCall o{layer.o, attention, attended, tokens, {}};
        o.epilogue = Epilogue::add_residual;
        o.residual = o.out = x;
        LinearCall gate_up{layer.gate_up, x, hidden, tokens, layer.mlp_norm};
        gate_up.epilogue = Epilogue::gate_up;
        gate_up.activation = layer.activation;
        gate_up.out = gated;
        LinearCall down{layer.down, gated, inner, tokens, {}};
        down.epilogue = Epilogue::add_residual;
        down.residual = down.out = x;
        for (LinearCall* call : {&o, &gate_up, &down}) {
            call->num_threads = num_threads;
            kernels().linear(*call);
        }
    }
}

using without_gil = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native CPU kernels of llama_fast; use them through llama_fast.ops.cpu.";

    // llama_fast/ops/native.py refuses another number: change both with any change of a signature or of an order.
    module.attr("interface") = 3;
    module.def("instruction_sets", &instruction_sets, "Names of the instruction sets that run here, best first.");
    module.def("selected", [] { return std::string(kernels().name); }, "The instruction set in use.");
    module.def("select", &select_kernels, py::arg("name"), "Use another instruction set; ValueError if it cannot run.");

    py::class_<LinearWeight>(module, "LinearWeight", "Projections of one input, where they lie in memory.")
        .def(py::init([](int dtype, int64_t in_features, int64_t group_size,
                         const std::vector<std::tuple<Address, Address, int64_t, Address, Address>>& parts) {
                 if (group_size != 0 && group_size != 32 && group_size != 64 && group_size != 128) {
                     throw std::invalid_argument("group_size " + std::to_string(group_size));
                 }
                 LinearWeight weight{static_cast<DType>(dtype), in_features, group_size, {}};
                 for (const auto& [matrix, bias, out_features, scales, zeros] : parts) {
                     weight.parts.push_back(
                         {at<void>(matrix), at<void>(bias), out_features, at<void>(scales), at<uint8_t>(zeros)});
                 }
                 return weight;
             }),
             py::arg("dtype"), py::arg("in_features"), py::arg("group_size"), py::arg("parts"));

    py::class_<Pages>(module, "Pages", "One layer's K and V in the paged cache.")
        .def(py::init([](Address k, Address v, int64_t page_stride, int64_t head_stride, int64_t num_pages,
                         int64_t num_kv_heads, int64_t page_size, int64_t head_dim) {
                 return Pages{at<void>(k), at<void>(v),  page_stride, head_stride,
                              num_pages,   num_kv_heads, page_size,   head_dim};
             }),
             py::arg("k"), py::arg("v"), py::arg("page_stride"), py::arg("head_stride"), py::arg("num_pages"),
             py::arg("num_kv_heads"), py::arg("page_size"), py::arg("head_dim"));

    py::class_<Places>(module, "Places", "Where the tokens of a run stand.")
        .def(py::init([](int64_t num_tokens, int64_t num_seqs, int64_t max_pages, Address slots, Address seq_ids,
                         Address query_starts, Address seq_lens, Address page_table) {
                 return Places{num_tokens,
                               num_seqs,
                               max_pages,
                               at<const int64_t>(slots),
                               at<const int64_t>(seq_ids),
                               at<const int64_t>(query_starts),
                               at<const int64_t>(seq_lens),
                               at<const int64_t>(page_table)};
             }),
             py::arg("num_tokens"), py::arg("num_seqs"), py::arg("max_pages"), py::arg("slots"), py::arg("seq_ids"),
             py::arg("query_starts"), py::arg("seq_lens"), py::arg("page_table"))
        .def("problem", &Places::problem, py::arg("num_pages"), py::arg("page_size"));

    py::class_<DecodeRows>(module, "DecodeRows", "Buffers with one row a sequence that decodes.")
        .def(py::init([](Address token_ids, Address slots, Address seq_lens, Address limits, Address done,
                         Address page_table, Address stop_mask, Address output_counts, int64_t max_pages,
                         int64_t vocab_size, int64_t spare_page) {
                 return DecodeRows{at<int64_t>(token_ids),
                                   at<int64_t>(slots),
                                   at<int64_t>(seq_lens),
                                   at<int64_t>(limits),
                                   at<int64_t>(done),
                                   at<int64_t>(page_table),
                                   at<const bool>(stop_mask),
                                   at<int32_t>(output_counts),
                                   max_pages,
                                   vocab_size,
                                   spare_page};
             }),
             py::arg("token_ids"), py::arg("slots"), py::arg("seq_lens"), py::arg("limits"), py::arg("done"),
             py::arg("page_table"), py::arg("stop_mask"), py::arg("output_counts"), py::arg("max_pages"),
             py::arg("vocab_size"), py::arg("spare_page"));
    module.def("advance", [](const DecodeRows& rows, Address tokens, Address indices, int64_t count, bool counted,
                             Address out) {
        advance(rows, at<const int64_t>(tokens), at<const int64_t>(indices), count, counted, at<int64_t>(out));
    });

    module.def(
        "linear",
        [](const LinearWeight& weight, Address x, int64_t x_stride, int64_t num_rows, Address norm, float eps,
           int epilogue, int activation, Address residual, Address out, int num_threads) {
            kernels().linear({&weight,
                              at<void>(x),
                              x_stride,
                              num_rows,
                              {at<void>(norm), eps},
                              static_cast<Epilogue>(epilogue),
                              static_cast<Activation>(activation),
                              at<void>(residual),
                              at<void>(out),
                              num_threads});
        },
        without_gil());
    module.def(
        "rms_norm",
        [](int dtype, Address x, int64_t x_stride, int64_t num_rows, int64_t width, Address weight, float eps,
           Address out, int num_threads) {
            kernels().rms_norm({static_cast<DType>(dtype),
                                at<void>(x),
                                x_stride,
                                num_rows,
                                width,
                                {at<void>(weight), eps},
                                at<void>(out),
                                num_threads});
        },
        without_gil());
    module.def(
        "rope_and_cache",
        [](int dtype, Address q, int64_t q_stride, Address k, int64_t k_stride, Address v, int64_t v_stride,
           int64_t num_heads, Address cos, Address sin, int64_t rotary_dim, const Places& places, const Pages& pages,
           Address q_out, int num_threads) {
            kernels().rope_and_cache({static_cast<DType>(dtype), at<void>(q), at<void>(k), at<void>(v), q_stride,
                                      k_stride, v_stride, num_heads, at<float>(cos), at<float>(sin), rotary_dim, places,
                                      pages, at<void>(q_out), num_threads});
        },
        without_gil());
    module.def(
        "norm_qkv_rope_cache",
        [](const LinearWeight& weight, Address x, int64_t x_stride, Address norm, float eps, int64_t num_heads,
           Address cos, Address sin, int64_t rotary_dim, const Places& places, const Pages& pages, Address q_out,
           int num_threads) {
            Workspace& space = workspace();
            space.start();
            space.take(places.num_tokens * weight.out_features() * item_size(weight.dtype));
            space.provide();
            norm_qkv_rope_cache(weight, at<void>(x), x_stride, {at<void>(norm), eps}, num_heads,
                                {at<float>(cos), at<float>(sin), rotary_dim}, places, pages, space.take(0),
                                at<void>(q_out), num_threads);
        },
        without_gil());
    py::class_<Layer>(module, "Layer", "A decoder layer's weights.")
        .def(py::init([](const LinearWeight* qkv, const LinearWeight* o, const LinearWeight* gate_up,
                         const LinearWeight* down, Address attention_norm, float attention_eps, Address mlp_norm,
                         float mlp_eps, int activation) {
            return Layer{qkv,
                         o,
                         gate_up,
                         down,
                         {at<void>(attention_norm), attention_eps},
                         {at<void>(mlp_norm), mlp_eps},
                         static_cast<Activation>(activation)};
        }));
    module.def(
        "run_layers",
        [](const std::vector<const Layer*>& layers, const std::vector<const Pages*>& pages, Address x,
           int64_t num_heads, int64_t split_size, Address cos, Address sin, int64_t rotary_dim, const Places& places,
           int num_threads) {
            run_layers(layers, pages, at<void>(x), num_heads, split_size, {at<float>(cos), at<float>(sin), rotary_dim},
                       places, num_threads);
        },
        without_gil());
    module.def(
        "attention",
        [](int dtype, Address q, int64_t q_stride, int64_t num_heads, int64_t split_size, const Places& places,
           const Pages& pages, Address out, int num_threads) {
            kernels().attention({static_cast<DType>(dtype), at<void>(q), q_stride, num_heads, split_size, places, pages,
                                 at<void>(out), num_threads});
        },
        without_gil());
    module.def(
        "silu_mul",
        [](int dtype, int activation, Address gate_up, int64_t gate_up_stride, int64_t num_rows, int64_t width,
           Address out, int num_threads) {
            kernels().silu_mul({static_cast<DType>(dtype), static_cast<Activation>(activation), at<void>(gate_up),
                                gate_up_stride, num_rows, width, at<void>(out), num_threads});
        },
        without_gil());
    module.def(
        "sample",
        [](Address logits, int64_t logits_stride, int64_t num_rows, int64_t vocab_size, Address temperature,
           Address top_p, Address min_p, Address repetition_penalty, Address frequency_penalty,
           Address presence_penalty, Address top_k, Address sample_index, Address seeds, Address position,
           Address prompt_mask, Address output_counts, Address bias, Address tokens, int num_threads) {
            kernels().sample({at<float>(logits), logits_stride, num_rows, vocab_size, at<float>(temperature),
                              at<float>(top_p), at<float>(min_p), at<float>(repetition_penalty),
                              at<float>(frequency_penalty), at<float>(presence_penalty), at<int32_t>(top_k),
                              at<int32_t>(sample_index), at<int64_t>(seeds), at<int64_t>(position),
                              at<bool>(prompt_mask), at<int32_t>(output_counts), at<float>(bias), at<int64_t>(tokens),
                              num_threads});
        },
        without_gil());
    module.def(
        "log_probs",
        [](Address logits, int64_t logits_stride, int64_t num_rows, int64_t vocab_size, int64_t num_top,
           Address token_ids, Address chosen, Address ranks, Address top_values, Address top_ids, int num_threads) {
            kernels().log_probs({at<float>(logits), logits_stride, num_rows, vocab_size, num_top,
                                 at<int64_t>(token_ids), at<float>(chosen), at<int64_t>(ranks), at<float>(top_values),
                                 at<int64_t>(top_ids), num_threads});
        },
        without_gil());
}
