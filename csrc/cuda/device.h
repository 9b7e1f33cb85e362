// What the kernels ask of the machine, as functions that tests/cuda_kernels/emulated_cuda.h has for a CPU too.
#pragma once

#include <cstdint>

namespace llama_fast {

using bfloat16 = uint16_t;  // bits; nothing here computes in it but the matrix instruction

// Four registers, or eight bf16 in the order of their addresses.
struct Vector {
    uint32_t x, y, z, w;
};

// bf16 is the upper half of fp32.
__device__ __forceinline__ float widened(bfloat16 value) { return __uint_as_float(static_cast<uint32_t>(value) << 16); }

// To the nearest, ties to even; NaN becomes 0x7fff.
__device__ __forceinline__ bfloat16 rounded(float value) {
    bfloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}

// 16 bytes of a weight: read once, so L1 keeps nothing of them and L2 gives them up first.
__device__ __forceinline__ Vector load_weight(const bfloat16* address, uint64_t policy) {
    Vector v;
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address), "l"(policy));
    return v;
}

__device__ __forceinline__ uint64_t weight_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes of a token, which every tile of the weight reads.
__device__ __forceinline__ Vector load_token(const bfloat16* address) {
    Vector v;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ float load_float(const bfloat16* address) { return widened(*address); }

template <class T>
__device__ __forceinline__ void store(T* address, T value) {
    *address = value;
}

// d [16, 8] += a [16, 16] times b [16, 8], fp32 sums of bf16 products, by a whole warp. PTX ISA, "Matrix Fragments for
// mma.m16n8k16": with group = lane / 4 and quad = lane % 4, each register two neighbours along the sum, low half first,
//   a0: row group,     k 2 * quad      a1: row group + 8, the same k
//   a2: row group,     k 2 * quad + 8  a3: row group + 8, the same k
//   b0: column group,  k 2 * quad      b1: column group,  k 2 * quad + 8
//   d[0], d[1]: row group, columns 2 * quad and 2 * quad + 1; d[2], d[3]: the same of row group + 8.
__device__ __forceinline__ void matrix_multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                uint32_t b0, uint32_t b1) {
    // volatile: an instruction of the whole warp must not move into a branch that only some of its threads take.
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// All threads of a block wait for each other; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void barrier() { __syncthreads(); }

}  // namespace llama_fast
