#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace llama_fast {
namespace {

std::vector<const Kernels*> runnable() {
    // These ask the operating system as well: it must save the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    std::vector<const Kernels*> sets;
    if (avx512) sets.push_back(&avx512_kernels);
    if (avx512 && __builtin_cpu_supports("avx512bf16")) {
        // Intel's vdpbf16ps is slower than two fused multiply-adds (Sapphire Rapids: 130 GFLOP/s against 180 on two
        // cores, 512 rows, bench/results/cpu-experiments.md); AMD's is faster.
        sets.insert(__builtin_cpu_is("intel") ? sets.end() : sets.begin(), &avx512_bf16_kernels);
    }
    if (avx2) sets.push_back(&avx2_kernels);
    return sets;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* set : runnable()) names.emplace_back(set->name);
    return names;
}

const Kernels& kernels() {
    const Kernels* current = selected.load(std::memory_order_acquire);
    if (current == nullptr) {
        const auto sets = runnable();
        if (sets.empty()) throw std::runtime_error("the processor lacks AVX2, FMA or F16C");
        current = sets.front();
        selected.store(current, std::memory_order_release);
    }
    return *current;
}

void select_kernels(const std::string& name) {
    for (const Kernels* set : runnable()) {
        if (name == set->name) return selected.store(set, std::memory_order_release);
    }
    throw std::invalid_argument("instruction set '" + name + "' does not run on this processor");
}

}  // namespace llama_fast
