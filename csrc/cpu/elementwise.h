// rms_norm, rope_and_cache, silu_mul: a pass over rows each. A row's bits depend on its width alone.

// x / sqrt(mean(x^2) + eps), rounded to T, times weight: llama_fast/ops/reference.py's order.
template <class T>
void norm_row(const T* x, const T* weight, float eps, int64_t width, T* out) {
    // Sums of 16 registers each before they are added: an outlier's square takes few small ones' last bits.
    Floats total = Vec::zero();
    for (int64_t first = 0; first < width; first += 16 * kLanes) {
        Floats sums[2] = {Vec::zero(), Vec::zero()};  // two, or every addition would wait for the last
        int index = 0;
        for_lanes(std::min<int64_t>(16 * kLanes, width - first), [&](int64_t i, auto load, auto) {
            const Floats value = load(x + first + i);
            sums[index & 1] = Vec::multiply_add(value, value, sums[index & 1]);
            ++index;
        });
        total = Vec::add(total, Vec::add(sums[0], sums[1]));
    }
    const float mean = Vec::sum(total) / static_cast<float>(width);
    const Floats scale = Vec::broadcast(1.0f / std::sqrt(mean + eps));
    for_lanes(width, [&](int64_t i, auto load, auto store) {
        store(out + i, Vec::mul(rounded<T>(Vec::mul(load(x + i), scale)), load(weight + i)));
    });
}

template <class T>
void rms_norm(const NormCall& call) {
    // A row costs less than waking a thread: several make a task.
    const int64_t rows_a_task = std::max<int64_t>(1, 16384 / std::max<int64_t>(call.width, 1));
    parallel_for((call.num_rows + rows_a_task - 1) / rows_a_task, call.num_threads, [&](int64_t task) {
        const int64_t end = std::min(call.num_rows, (task + 1) * rows_a_task);
        for (int64_t row = task * rows_a_task; row < end; ++row) {
            norm_row(static_cast<const T*>(call.x) + row * call.x_stride, static_cast<const T*>(call.norm.weight),
                     call.norm.eps, call.width, static_cast<T*>(call.out) + row * call.width);
        }
    });
}

inline Floats sigmoid(Floats x) {
    return Vec::div(Vec::broadcast(1.0f), Vec::add(Vec::broadcast(1.0f), exp(negative(x))));
}

// Activations that no vector formula is worth: one libm call a lane.
template <class Function>
Floats lane_by_lane(Floats x, Function function) {
    float lanes[kLanes];
    Vec::store(lanes, x);
    for (float& lane : lanes) lane = function(lane);
    return Vec::load(lanes);
}

// As llama_fast/ops/activations.py's.
inline Floats activate(Activation activation, Floats x) {
    switch (activation) {
        case Activation::silu:
            return Vec::div(x, Vec::add(Vec::broadcast(1.0f), exp(negative(x))));
        case Activation::gelu:
            return lane_by_lane(x, [](float v) { return v * 0.5f * (1.0f + std::erf(v * 0.707106781f)); });
        case Activation::gelu_tanh:
            return lane_by_lane(
                x, [](float v) { return 0.5f * v * (1.0f + std::tanh(0.797884561f * (v + 0.044715f * v * v * v))); });
        case Activation::laplace:
            return lane_by_lane(
                x, [](float v) { return 0.5f * (1.0f + std::erf((v - 0.707106781f) / (0.282094792f * 1.41421356f))); });
        case Activation::leaky_relu:
            return lane_by_lane(x, [](float v) { return v < 0.0f ? v * 0.01f : v; });
        case Activation::linear:
            return x;
        case Activation::mish:
            // log1p: for a v far below zero log(1 + exp(v)) is exp(v), not 0.
            return lane_by_lane(x, [](float v) { return v * std::tanh(v > 20.0f ? v : std::log1p(std::exp(v))); });
        case Activation::quick_gelu:
            return Vec::mul(x, sigmoid(Vec::mul(x, Vec::broadcast(1.702f))));
        case Activation::relu:
            return Vec::max(Vec::zero(), x);
        case Activation::relu2:
            x = Vec::max(Vec::zero(), x);
            return Vec::mul(x, x);
        case Activation::relu6:
            return Vec::min(Vec::broadcast(6.0f), Vec::max(Vec::zero(), x));
        case Activation::sigmoid:
            return sigmoid(x);
        case Activation::tanh:
            return lane_by_lane(x, [](float v) { return std::tanh(v); });
    }
    return x;
}

template <class T>
void silu_mul(const SiluMulCall& call) {
    constexpr int64_t kColumns = 4096;
    const int64_t blocks = (call.width + kColumns - 1) / kColumns;
    parallel_for(call.num_rows * blocks, call.num_threads, [&](int64_t task) {
        const int64_t row = task / blocks, first = task % blocks * kColumns;
        const T* gate = static_cast<const T*>(call.gate_up) + row * call.gate_up_stride + first;
        T* out = static_cast<T*>(call.out) + row * call.width + first;
        for_lanes(std::min(kColumns, call.width - first), [&](int64_t i, auto load, auto store) {
            store(out + i, Vec::mul(activate(call.activation, load(gate + i)), load(gate + call.width + i)));
        });
    });
}

// Rotates the first rotary_dim dims of a head, pairs (i, i + rotary_dim / 2), and copies the others.
template <class T>
void rotate_head(const T* x, const float* cos, const float* sin, int64_t rotary_dim, int64_t head_dim, T* out) {
    const int64_t half = rotary_dim / 2;
    for_lanes(half, [&](int64_t i, auto load, auto store) {
        const Floats first = load(x + i), second = load(x + half + i);
        store(out + i, Vec::sub(Vec::mul(first, load(cos + i)), Vec::mul(second, load(sin + i))));
        store(out + half + i, Vec::add(Vec::mul(second, load(cos + half + i)), Vec::mul(first, load(sin + half + i))));
    });
    std::memcpy(out + rotary_dim, x + rotary_dim, (head_dim - rotary_dim) * sizeof(T));
}

template <class T>
bool all_finite(const T* x, int64_t count) {
    constexpr uint32_t exponent = std::is_same_v<T, float> ? 0x7f800000u : std::is_same_v<T, bf16> ? 0x7f80u : 0x7c00u;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        if constexpr (std::is_same_v<T, float>) {
            bits = std::bit_cast<uint32_t>(x[i]);
        } else {
            bits = x[i].bits;
        }
        finite &= (bits & exponent) != exponent;
    }
    return finite;
}

template <class T>
constexpr T quiet_nan() {
    if constexpr (std::is_same_v<T, float>) return std::numeric_limits<float>::quiet_NaN();
    if constexpr (std::is_same_v<T, bf16>) return bf16{0x7fc0};
    if constexpr (std::is_same_v<T, fp16>) return fp16{0x7e00};
}

// Rotates q and k in float and writes k and v into their pages. A head of v that is not finite is written as zeros, and
// NaN as its k: exactly the rows that see the slot become NaN, as in the reference.
template <class T>
void rope_and_cache(const RopeCall& call) {
    const Pages& pages = call.pages;
    const Places& places = call.places;
    const int64_t head_dim = pages.head_dim;
    const int64_t rows_a_task = std::max<int64_t>(1, 4096 / std::max<int64_t>(call.num_heads * head_dim, 1));
    parallel_for((places.num_tokens + rows_a_task - 1) / rows_a_task, call.num_threads, [&](int64_t task) {
        const int64_t end = std::min(places.num_tokens, (task + 1) * rows_a_task);
        for (int64_t token = task * rows_a_task; token < end; ++token) {
            const float* cos = call.cos + token * call.rotary_dim;
            const float* sin = call.sin + token * call.rotary_dim;
            const T* q = static_cast<const T*>(call.q) + token * call.q_stride;
            T* q_out = static_cast<T*>(call.q_out) + token * call.num_heads * head_dim;
            for (int64_t head = 0; head < call.num_heads; ++head) {
                rotate_head(q + head * head_dim, cos, sin, call.rotary_dim, head_dim, q_out + head * head_dim);
            }
            const int64_t slot = places.slots[token];
            const int64_t page = places.page_table[places.seq_ids[token] * places.max_pages + slot / pages.page_size];
            for (int64_t head = 0; head < pages.num_kv_heads; ++head) {
                const int64_t place =
                    page * pages.page_stride + head * pages.head_stride + slot % pages.page_size * head_dim;
                T* k_out = static_cast<T*>(pages.k) + place;
                T* v_out = static_cast<T*>(pages.v) + place;
                const T* k = static_cast<const T*>(call.k) + token * call.k_stride + head * head_dim;
                const T* v = static_cast<const T*>(call.v) + token * call.v_stride + head * head_dim;
                if (all_finite(v, head_dim)) {
                    rotate_head(k, cos, sin, call.rotary_dim, head_dim, k_out);
                    std::memcpy(v_out, v, head_dim * sizeof(T));
                } else {
                    std::fill_n(k_out, head_dim, quiet_nan<T>());
                    std::memset(v_out, 0, head_dim * sizeof(T));
                }
            }
        }
    });
}
