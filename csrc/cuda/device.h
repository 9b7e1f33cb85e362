// What the kernels ask of the machine, as functions that tests/cuda_kernels/emulated_cuda.h has for a CPU too.
#pragma once

#include <cstdint>

namespace llama_fast {

using bfloat16 = uint16_t;  // bits

// Four registers.
struct Vector {
    uint32_t x, y, z, w;
};

// Two registers, or four bf16 in the order of their addresses.
struct Pair {
    uint32_t x, y;
};

// bf16 is the upper half of fp32.
__device__ __forceinline__ float widened(bfloat16 value) { return __uint_as_float(static_cast<uint32_t>(value) << 16); }

// To the nearest, ties to even; NaN becomes 0x7fff.
__device__ __forceinline__ bfloat16 rounded(float value) {
    bfloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}

// a * b + c, rounded once.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// --- memory ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float load_float(const bfloat16* address) { return widened(*address); }

template <class T>
__device__ __forceinline__ void store(T* address, T value) {
    *address = value;
}

// An address in shared memory.
using Shared = uint32_t;

__device__ __forceinline__ Shared in_shared(void* address) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

// Copies to shared memory, or of zeros where there is nothing to `copy`: there after commit_copies and
// wait_for_copies, for this thread; for others after a barrier behind that.

// 16 bytes of x, which other blocks on this multiprocessor read too.
__device__ __forceinline__ void copy_x(Shared to, const bfloat16* from, bool copy) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copy ? 16 : 0) : "memory");
}

// 16 bytes of words: read once, so L1 keeps nothing of them and L2 gives them up first.
__device__ __forceinline__ void copy_words(Shared to, const uint32_t* from, bool copy, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(copy ? 16 : 0), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ uint64_t words_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Two neighbouring numbers, 4 bytes.
__device__ __forceinline__ void copy_numbers(Shared to, const bfloat16* from, bool copy) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(copy ? 4 : 0) : "memory");
}

// Ends a batch of this thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last N batches of this thread.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 16, 8 and 2 bytes.
__device__ __forceinline__ Vector load_words(Shared from) {
    Vector v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

__device__ __forceinline__ Pair load_x(Shared from) {
    Pair v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from));
    return v;
}

__device__ __forceinline__ float load_number(Shared from) {
    bfloat16 number;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(number) : "r"(from));
    return widened(number);
}

// --- registers -------------------------------------------------------------------------------------------------------

// The lower halves of two registers, or their upper halves, the first one's below.
__device__ __forceinline__ uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// bf16 in both halves of a register, of a number that is one.
__device__ __forceinline__ uint32_t twice(float number) { return __byte_perm(__float_as_uint(number), 0, 0x3232); }

// The lowest nibble of each half as bf16 128 + nibble: an exponent set beside it makes it a number.
__device__ __forceinline__ uint32_t lowest_nibbles(uint32_t halves) {
    uint32_t numbers;
    asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(numbers) : "r"(halves));  // (a & b) | c
    return numbers;
}

// Both bf16 of a plus both of b, by the instruction that every architecture has: a * 1 + b.
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80), "r"(b));
    return sum;
}

// --- threads ---------------------------------------------------------------------------------------------------------

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

// The same for the `threads` threads, whole warps, that name one `number` from 0 to 14.
__device__ __forceinline__ void barrier_among(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number + 1), "r"(threads) : "memory");
}

// Waits until the kernels before this one on the stream are done and what they wrote is there. A kernel that is
// launched to start earlier must not touch what they write before, nor write what they read.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel that is launched so start when all blocks of this one have come here. Only behind
// wait_for_earlier_kernels: so what a kernel waits for is behind all that came before.
__device__ __forceinline__ void let_later_kernels_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace llama_fast
