#include "preamble.h"

TARGET_BEGIN("avx2,fma,f16c")
namespace llama_fast {
namespace {

#include "vector_avx2.h"
#include "kernels.h"

}  // namespace

// Constant: code of this file must not run before the processor was asked.
constinit const Kernels avx2_kernels = kernel_table("avx2");

}  // namespace llama_fast
TARGET_END
