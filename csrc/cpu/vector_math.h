// What every instruction set builds from its registers alike: parts of registers, exp, log, scratch memory.

using Floats = Vec::Floats;
constexpr int kLanes = Vec::lanes;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The first `count` < kLanes elements, zeros behind them.
template <class T>
Floats load_part(const T* p, int64_t count) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, count * sizeof(T));
    return Vec::load(lanes);
}

template <class T>
void store_part(T* p, Floats x, int64_t count) {
    T lanes[kLanes];
    Vec::store(lanes, x);
    std::memcpy(p, lanes, count * sizeof(T));
}

// body(offset, load, store) over [0, width), registers at a time; the last may be a part of one.
template <class Body>
void for_lanes(int64_t width, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        body(i, [](const auto* p) { return Vec::load(p); }, [](auto* p, Floats x) { Vec::store(p, x); });
    }
    if (const int64_t rest = width - i; rest > 0) {
        body(
            i, [rest](const auto* p) { return load_part(p, rest); },
            [rest](auto* p, Floats x) { store_part(p, x, rest); });
    }
}

// A number of T's precision, back as float.
template <class T>
Floats rounded(Floats x) {
    if constexpr (std::is_same_v<T, float>) return x;
    T lanes[kLanes];
    Vec::store(lanes, x);
    return Vec::load(lanes);
}

inline Floats negative(Floats x) { return Vec::mul(x, Vec::broadcast(-1.0f)); }

// Cephes' expf: about 1.5 ulp. NaN gives NaN, beyond the range infinity or zero.
inline Floats exp(Floats x) {
    x = Vec::min(Vec::broadcast(89.0f), x);
    x = Vec::max(Vec::broadcast(-104.0f), x);
    const Floats n = Vec::round(Vec::mul(x, Vec::broadcast(1.44269504f)));
    Floats r = Vec::multiply_add(n, Vec::broadcast(-0.693359375f), x);
    r = Vec::multiply_add(n, Vec::broadcast(2.12194440e-4f), r);
    Floats p = Vec::broadcast(1.9875691500e-4f);
    for (const float coefficient :
         {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        p = Vec::multiply_add(p, r, Vec::broadcast(coefficient));
    }
    p = Vec::add(Vec::multiply_add(Vec::mul(r, r), p, r), Vec::broadcast(1.0f));
    return Vec::scale(p, n);
}

inline float exp(float x) {
    float lanes[kLanes];
    Vec::store(lanes, exp(Vec::broadcast(x)));
    return lanes[0];
}

// Cephes' logf: about 1 ulp; x positive and normal.
inline Floats log(Floats x) {
    Floats exponent;
    Floats m = Vec::mantissa(x, exponent);
    const Floats below = Vec::broadcast(0.707106781f), one = Vec::broadcast(1.0f);
    exponent = Vec::where_less(m, below, Vec::sub(exponent, one), exponent);
    m = Vec::sub(Vec::where_less(m, below, Vec::add(m, m), m), one);
    const Floats square = Vec::mul(m, m);
    Floats p = Vec::broadcast(7.0376836292e-2f);
    for (const float coefficient : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                    -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
        p = Vec::multiply_add(p, m, Vec::broadcast(coefficient));
    }
    p = Vec::mul(Vec::mul(p, m), square);
    p = Vec::multiply_add(exponent, Vec::broadcast(-2.12194440e-4f), p);
    p = Vec::multiply_add(square, Vec::broadcast(-0.5f), p);
    return Vec::multiply_add(exponent, Vec::broadcast(0.693359375f), Vec::add(m, p));
}

// Memory that a thread keeps from task to task; `slot` tells the uses apart that live at the same time.
inline void* scratch_bytes(int slot, int64_t bytes) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<void, Free> memory[kScratchSlots];
    thread_local int64_t sizes[kScratchSlots] = {};
    if (sizes[slot] < bytes) {
        const int64_t size = round_up(bytes + bytes / 4, 4096);
        memory[slot].reset();
        sizes[slot] = 0;
        memory[slot].reset(std::aligned_alloc(64, size));
        if (!memory[slot]) throw std::bad_alloc();
        sizes[slot] = size;
    }
    return memory[slot].get();
}

template <class T>
T* scratch(int slot, int64_t count) {
    return static_cast<T*>(scratch_bytes(slot, count * static_cast<int64_t>(sizeof(T))));
}

// Blocks of outputs of `linear`: weights of a task that fit the smallest L2 in use beside what else lies there.
constexpr int64_t kDirectBlockBytes = 192 * 1024;
constexpr int64_t kMaxBlockColumns = 240;
