// One instruction set's kernels, from the registers that the including file has chosen. Everything lies in an unnamed
// namespace: the linker must not merge functions that were compiled for different instruction sets.
#include "vector_math.h"
#include "elementwise.h"
#include "dense.h"
#include "int4.h"
#include "linear.h"
#include "attention.h"
#include "sample.h"

// The typed kernel of a call's dtype.
template <class Call, class WithT>
void for_dtype(DType dtype, const Call& call, WithT with) {
    switch (dtype) {
        case DType::bfloat16:
            return with(bf16{}, call);
        case DType::float16:
            return with(fp16{}, call);
        case DType::float32:
            return with(float{}, call);
    }
}

constexpr Kernels kernel_table(const char* name) {
    return {
        name,
        [](const LinearCall& c) {
            for_dtype(c.weight->dtype, c, [](auto t, const auto& call) { linear<decltype(t)>(call); });
        },
        [](const NormCall& c) { for_dtype(c.dtype, c, [](auto t, const auto& call) { rms_norm<decltype(t)>(call); }); },
        [](const RopeCall& c) {
            for_dtype(c.dtype, c, [](auto t, const auto& call) { rope_and_cache<decltype(t)>(call); });
        },
        [](const AttentionCall& c) {
            for_dtype(c.dtype, c, [](auto t, const auto& call) { attention<decltype(t)>(call); });
        },
        [](const SiluMulCall& c) {
            for_dtype(c.dtype, c, [](auto t, const auto& call) { silu_mul<decltype(t)>(call); });
        },
        [](const SampleCall& c) { sample(c); },
        [](const LogProbsCall& c) { log_probs(c); },
    };
}
