#include "preamble.h"

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace llama_fast {
namespace {

#include "vector_avx512.h"
#include "kernels.h"

}  // namespace

// Constant: code of this file must not run before the processor was asked.
constinit const Kernels avx512_kernels = kernel_table("avx512");

}  // namespace llama_fast
TARGET_END
