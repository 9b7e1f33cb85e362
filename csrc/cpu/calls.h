// Number formats of weights and activations, and the calls that the kernels take.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llama_fast {

// Storage only: arithmetic is in float, conversions are the vector headers'.
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

enum class DType : int { bfloat16 = 0, float16 = 1, float32 = 2 };

constexpr int64_t item_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Names and order of llama_fast/ops/cpu.py's table; aliases are resolved there.
enum class Activation : int {
    silu,
    gelu,
    gelu_tanh,
    laplace,
    leaky_relu,
    linear,
    mish,
    quick_gelu,
    relu,
    relu2,
    relu6,
    sigmoid,
    tanh,
};

// weight [out_features, in_features], bias [out_features] or null, as the checkpoint's file holds them. Of 4-bit
// integers: weight uint32 [out_features, in_features / 8], nibble i of a row's word l is input feature 8 * l + i;
// scales [out_features, groups] in the weight's dtype; zeros [out_features, groups], 0 to 16, or null: 8 throughout.
struct LinearPart {
    const void* weight;
    const void* bias;
    int64_t out_features;
    const void* scales = nullptr;
    const uint8_t* zeros = nullptr;
};

// Projections of one input; their outputs stand beside each other. dtype: of x, outputs, biases, and weights or scales.
struct LinearWeight {
    DType dtype;
    int64_t in_features;
    int64_t group_size;  // 32, 64 or 128 input features that share a scale of 4-bit integers; 0: weights are of dtype
    std::vector<LinearPart> parts;

    int64_t out_features() const {
        int64_t sum = 0;
        for (const LinearPart& part : parts) sum += part.out_features;
        return sum;
    }
};

// Weight null: no norm.
struct Norm {
    const void* weight = nullptr;
    float eps = 0;
};

enum class Epilogue { store, add_residual, gate_up, store_float };

// out = epilogue(norm(x) @ weight.T + bias).
struct LinearCall {
    const LinearWeight* weight;
    const void* x;  // [num_rows, in_features]
    int64_t x_stride;
    int64_t num_rows;
    Norm norm;
    Epilogue epilogue = Epilogue::store;
    Activation activation = Activation::silu;  // of gate_up: parts are gate and up
    const void* residual = nullptr;            // [num_rows, out_features], contiguous
    void* out = nullptr;                       // [num_rows, out_features] (half of it with gate_up), contiguous
    int num_threads = 1;
};

struct NormCall {
    DType dtype;
    const void* x;  // [num_rows, width]
    int64_t x_stride;
    int64_t num_rows, width;
    Norm norm;
    void* out;  // contiguous
    int num_threads;
};

// One layer's cache, [num_pages, num_kv_heads, page_size, head_dim]; slots of a head are contiguous, strides in
// elements.
struct Pages {
    void* k;
    void* v;
    int64_t page_stride, head_stride;
    int64_t num_pages, num_kv_heads, page_size, head_dim;
};

// Where the tokens of a run stand; int64 tensors of Batch.
struct Places {
    int64_t num_tokens, num_seqs, max_pages;
    const int64_t* slots;         // [num_tokens]
    const int64_t* seq_ids;       // [num_tokens]
    const int64_t* query_starts;  // [num_seqs + 1]
    const int64_t* seq_lens;      // [num_seqs]
    const int64_t* page_table;    // [num_seqs, max_pages]

    // What the kernels take for granted about numbers they follow into memory; empty where all is well.
    std::string problem(int64_t num_pages, int64_t page_size) const;
};

struct RopeCall {
    DType dtype;
    const void *q, *k, *v;  // [num_tokens, heads, head_dim], rows strided
    int64_t q_stride, k_stride, v_stride;
    int64_t num_heads;
    const float *cos, *sin;  // [num_tokens, rotary_dim]
    int64_t rotary_dim;
    Places places;
    Pages pages;
    void* q_out;  // [num_tokens, num_heads, head_dim], contiguous
    int num_threads;
};

struct AttentionCall {
    DType dtype;
    const void* q;  // [num_tokens, num_heads, head_dim], rows strided
    int64_t q_stride;
    int64_t num_heads;
    int64_t split_size;
    Places places;
    Pages pages;
    void* out;  // [num_tokens, num_heads * head_dim], contiguous
    int num_threads;
};

struct SiluMulCall {
    DType dtype;
    Activation activation;
    const void* gate_up;  // [num_rows, 2 * width]
    int64_t gate_up_stride;
    int64_t num_rows, width;
    void* out;  // contiguous
    int num_threads;
};

// Fields of SamplingBatch, one entry a row; the last three may be null.
struct SampleCall {
    const float* logits;  // [num_rows, vocab_size]
    int64_t logits_stride;
    int64_t num_rows, vocab_size;
    const float *temperature, *top_p, *min_p, *repetition_penalty, *frequency_penalty, *presence_penalty;
    const int32_t *top_k, *sample_index;
    const int64_t *seeds, *position;
    const bool* prompt_mask;       // [num_rows, vocab_size]
    const int32_t* output_counts;  // [num_rows, vocab_size]
    const float* bias;             // [num_rows, vocab_size]
    int64_t* tokens;               // [num_rows]
    int num_threads;
};

struct LogProbsCall {
    const float* logits;  // [num_rows, vocab_size]
    int64_t logits_stride;
    int64_t num_rows, vocab_size, num_top;
    const int64_t* token_ids;  // [num_rows]
    float* chosen;             // [num_rows]
    int64_t* ranks;            // [num_rows]
    float* top_values;         // [num_rows, num_top]
    int64_t* top_ids;          // [num_rows, num_top]
    int num_threads;
};

// One instruction set's kernels.
struct Kernels {
    const char* name;
    void (*linear)(const LinearCall&);
    void (*rms_norm)(const NormCall&);
    void (*rope_and_cache)(const RopeCall&);
    void (*attention)(const AttentionCall&);
    void (*silu_mul)(const SiluMulCall&);
    void (*sample)(const SampleCall&);
    void (*log_probs)(const LogProbsCall&);
};

extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;

}  // namespace llama_fast
