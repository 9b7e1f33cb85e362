// csrc/cuda/device.h for a CPU: the threads of a block as fibers of one thread, the matrix instruction by its
// fragments.
//
// Loads, stores and copies are checked against the memory that a run may touch and against their alignment; shared
// memory starts as NaN; what a copy replaces is NaN from when it is issued, and its bytes are there when the thread has
// waited for it; threads that wait for others which never come end the run. All of it is an error's text, not a crash.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#define __device__
#define __forceinline__ inline

namespace llama_fast {

using bfloat16 = uint16_t;

struct Vector {
    uint32_t x, y, z, w;
};

struct Pair {
    uint32_t x, y;
};

// An address in shared memory: from its start.
using Shared = uint32_t;

namespace emulated {

// Bytes that may be read or written.
struct Range {
    uintptr_t begin, end;
    bool writable;
};

struct Machine {
    static constexpr int lanes = 32, stack_bytes = 128 << 10;
    // On its way to shared memory; a source of nothing is zeros.
    struct Copy {
        Shared to;
        const void* from;
        uint32_t bytes;
    };
    struct Fiber {
        ucontext_t start;
        jmp_buf resume;
        std::unique_ptr<char[]> stack{new char[stack_bytes]};
        bool started = false, done = false;
        bool waited = false;  // for earlier kernels
        // The last batch is open.
        std::deque<std::vector<Copy>> batches;
    };
    struct Barrier {
        int arrived = 0, turn = 0;
    };
    // Fragments on their way to the matrix instruction, and its results.
    struct Warp {
        uint32_t a[lanes][4], b[lanes][2];
        float d[lanes][4];
        int arrived = 0, turn = 0;
    };

    std::vector<Range> ranges;
    // Where ranges begin that earlier kernels write.
    std::vector<const void*> of_earlier;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    // Shared memory of a block, aligned as the hardware's. The barrier of a whole block comes last.
    std::vector<uint64_t> shared;
    Barrier barriers[16];
    jmp_buf caller;
    int current = 0, waiting = 0;
    void (*body)(int thread) = nullptr;
    std::string problem;

    void give_up(const std::string& text) {
        problem = text + " (thread " + std::to_string(current) + ")";
        _longjmp(caller, 1);
    }

    void touch(const void* address, uintptr_t bytes, bool write) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
        if (begin % bytes != 0) give_up("an address of " + std::to_string(bytes) + " bytes is not aligned");
        for (const Range& range : ranges) {
            if (begin < range.begin || begin + bytes > range.end || (write && !range.writable)) continue;
            for (const void* start : of_earlier) {
                if (reinterpret_cast<uintptr_t>(start) == range.begin || write) wanted_waits();
            }
            return;
        }
        give_up(write ? "a store outside the output" : "a load outside the operands");
    }

    void wanted_waits() {
        if (!fibers[current].waited) give_up("no wait for earlier kernels");
    }

    char* shared_at(Shared address, uint32_t bytes) {
        if (address % bytes != 0) give_up("a shared address of " + std::to_string(bytes) + " bytes is not aligned");
        if (address + bytes > shared.size() * sizeof(uint64_t)) give_up("an access outside shared memory");
        return reinterpret_cast<char*>(shared.data()) + address;
    }

    void copy(Shared to, const void* from, uint32_t bytes, bool copy) {
        if (copy) touch(from, bytes, false);
        std::memset(shared_at(to, bytes), 0xff, bytes);
        fibers[current].batches.back().push_back({to, copy ? from : nullptr, bytes});
    }

    void finish_copies(size_t but) {
        auto& batches = fibers[current].batches;
        for (; batches.size() > but + 1; batches.pop_front()) {
            for (const Copy& copy : batches.front()) {
                char* const target = shared_at(copy.to, copy.bytes);
                if (copy.from == nullptr) {
                    std::memset(target, 0, copy.bytes);
                } else {
                    std::memcpy(target, copy.from, copy.bytes);
                }
            }
        }
    }

    void meet(Barrier& barrier, int threads) {
        const int turn = barrier.turn;
        if (++barrier.arrived == threads) {
            barrier.arrived = waiting = 0;
            ++barrier.turn;
        }
        while (barrier.turn == turn) wait();
    }

    void go_to(int thread) {
        current = thread;
        if (!fibers[thread].started) {
            fibers[thread].started = true;
            setcontext(&fibers[thread].start);
        }
        _longjmp(fibers[thread].resume, 1);
    }

    // On to the next thread that is not done; back to the caller after the last.
    void leave() {
        const int count = static_cast<int>(fibers.size());
        for (int step = 1; step <= count; ++step) {
            const int next = (current + step) % count;
            if (!fibers[next].done) go_to(next);
        }
        _longjmp(caller, 2);
    }

    void wait() {
        if (++waiting > 4 * static_cast<int>(fibers.size())) give_up("threads wait for others that never come");
        if (_setjmp(fibers[current].resume) == 0) leave();
    }

    // A block; false and `problem` if it fails.
    bool run(int num_threads, int shared_bytes, void (*thread_body)(int));
};

inline Machine& machine() {
    static Machine the_machine;
    return the_machine;
}

inline void enter() {
    Machine& m = machine();
    m.body(m.current);
    m.fibers[m.current].done = true;
    m.waiting = 0;
    m.leave();
}

inline bool Machine::run(int num_threads, int shared_bytes, void (*thread_body)(int)) {
    fibers.resize(num_threads);
    shared.assign((shared_bytes + 7) / 8, ~uint64_t{0});
    warps.assign(num_threads / lanes, Warp{});
    body = thread_body;
    for (Barrier& barrier : barriers) barrier = {};
    waiting = 0;
    problem.clear();
    for (Fiber& fiber : fibers) {
        fiber.started = fiber.done = fiber.waited = false;
        fiber.batches.assign(1, {});
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = stack_bytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    const int outcome = _setjmp(caller);
    if (outcome == 0) go_to(0);
    return outcome == 2;
}

inline float number(uint32_t pair, int half) {
    const uint32_t bits = half == 0 ? pair << 16 : pair & 0xffff0000u;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16": the four (A) or two (B) registers of lane 4 * group + quad.
inline float a_element(const Machine::Warp& warp, int row, int k) {
    return number(warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
}

inline float b_element(const Machine::Warp& warp, int k, int column) {
    return number(warp.b[column * 4 + k % 8 / 2][k / 8], k % 2);
}

inline void multiply(Machine::Warp& warp) {
    float a[16][16], b[8][16];
    for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 16; ++row) a[row][k] = a_element(warp, row, k);
        for (int column = 0; column < 8; ++column) b[column][k] = b_element(warp, k, column);
    }
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            float& d = warp.d[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2];
            double sum = d;
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[column][k];
            d = static_cast<float>(sum);
        }
    }
}

}  // namespace emulated

inline float widened(bfloat16 value) { return emulated::number(value, 0); }

inline bfloat16 rounded(float value) {
    if (std::isnan(value)) return 0x7fff;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<bfloat16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline float load_float(const bfloat16* address) {
    emulated::machine().touch(address, sizeof(bfloat16), false);
    return widened(*address);
}

template <class T>
void store(T* address, T value) {
    emulated::machine().touch(address, sizeof(T), true);
    std::memcpy(address, &value, sizeof(T));
}

inline Shared in_shared(void* address) {
    return static_cast<Shared>(static_cast<char*>(address) -
                               reinterpret_cast<char*>(emulated::machine().shared.data()));
}

inline void copy_x(Shared to, const bfloat16* from, bool copy) { emulated::machine().copy(to, from, 16, copy); }

inline void copy_words(Shared to, const uint32_t* from, bool copy, uint64_t) {
    emulated::machine().copy(to, from, 16, copy);
}

inline uint64_t words_policy() { return 0; }

inline void copy_numbers(Shared to, const bfloat16* from, bool copy) { emulated::machine().copy(to, from, 4, copy); }

inline void commit_copies() {
    emulated::Machine& m = emulated::machine();
    m.fibers[m.current].batches.emplace_back();
}

template <int N>
void wait_for_copies() {
    emulated::machine().finish_copies(N);
}

template <class T>
T load_shared(Shared from) {
    T value;
    std::memcpy(&value, emulated::machine().shared_at(from, sizeof(T)), sizeof(T));
    return value;
}

inline Vector load_words(Shared from) { return load_shared<Vector>(from); }
inline Pair load_x(Shared from) { return load_shared<Pair>(from); }
inline float load_number(Shared from) { return widened(load_shared<bfloat16>(from)); }

inline uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

inline uint32_t twice(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    return bits >> 16 | (bits & 0xffff0000u);
}

inline uint32_t lowest_nibbles(uint32_t halves) { return (halves & 0x000f000f) | 0x43004300; }

inline uint32_t add_halves(uint32_t a, uint32_t b) {
    const uint32_t low = rounded(emulated::number(a, 0) + emulated::number(b, 0));
    return low | static_cast<uint32_t>(rounded(emulated::number(a, 1) + emulated::number(b, 1))) << 16;
}

inline void matrix_multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                            uint32_t b1) {
    emulated::Machine& m = emulated::machine();
    emulated::Machine::Warp& warp = m.warps[m.current / m.lanes];
    const int lane = m.current % m.lanes;
    const uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    std::memcpy(warp.a[lane], a, sizeof(a));
    std::memcpy(warp.b[lane], b, sizeof(b));
    std::memcpy(warp.d[lane], d, sizeof(d));
    const int turn = warp.turn;
    if (++warp.arrived == m.lanes) {
        emulated::multiply(warp);
        warp.arrived = m.waiting = 0;
        ++warp.turn;
    }
    while (warp.turn == turn) m.wait();
    std::memcpy(d, warp.d[lane], sizeof(d));
}

inline void wait_for_earlier_kernels() {
    emulated::Machine& m = emulated::machine();
    m.fibers[m.current].waited = true;
}

inline void let_later_kernels_start() { emulated::machine().wanted_waits(); }

inline void barrier() {
    emulated::Machine& m = emulated::machine();
    m.meet(m.barriers[15], static_cast<int>(m.fibers.size()));
}

inline void barrier_among(int number, int threads) {
    emulated::Machine& m = emulated::machine();
    m.meet(m.barriers[number], threads);
}

}  // namespace llama_fast
