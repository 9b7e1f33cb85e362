// sample and log_probs: the arithmetic of llama_fast/ops/reference_sample.py, one task a row.
//
// A row's result does not depend on the others. Probability mass is summed in fixed point, so its order is free; the
// thresholds of top-k and top-p are exact and need no sort of the whole vocabulary: a histogram finds the bucket that
// holds one, and only that bucket is sorted. Noise is Philox 4x32-10 and Gumbel-max, laid out as in the reference.

constexpr double kMassOne = 4398046511104.0;  // 2**42
constexpr int64_t kVectorBlock = 64;

// x [count rounded up to kLanes] -> fixed-point exp(x), x at most 0.
inline void fill_mass(const float* x, int64_t count, int64_t* mass) {
    for_lanes(count, [&](int64_t i, auto load, auto) {
        float lanes[kLanes];
        Vec::store(lanes, exp(load(x + i)));
        const int64_t end = std::min<int64_t>(kLanes, count - i);
        for (int64_t lane = 0; lane < end; ++lane) {
            mass[i + lane] = static_cast<int64_t>(lanes[lane] * static_cast<float>(kMassOne));
        }
    });
}

// x at most 0: buckets ascend as x falls, by exponent and three bits more.
inline uint32_t bucket_of(float x) { return (std::bit_cast<uint32_t>(x) & 0x7fffffffu) >> 20; }

// The least x that stays: one stays if less than `limit` of the weight lies above it. x [count] at most 0, limit > 0,
// and the weights' sum is at least `limit`.
template <class Weight>
float lowest_kept(const float* x, int64_t count, Weight weight, double limit) {
    int64_t buckets[2048] = {};
    for (int64_t i = 0; i < count; ++i) buckets[bucket_of(x[i])] += weight(i);
    int64_t above = 0, above_bucket = 0;
    uint32_t last = 0;
    for (uint32_t bucket = 0; bucket < 2048; ++bucket) {
        if (buckets[bucket] == 0) continue;
        if (!(static_cast<double>(above) < limit)) break;
        last = bucket;
        above_bucket = above;
        above += buckets[bucket];
    }
    std::vector<std::pair<float, int64_t>> inside;
    for (int64_t i = 0; i < count; ++i) {
        if (bucket_of(x[i]) == last) inside.emplace_back(x[i], weight(i));
    }
    std::sort(inside.begin(), inside.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    float lowest = inside.front().first;
    for (const auto& [value, value_weight] : inside) {
        if (!(static_cast<double>(above_bucket) < limit)) break;
        lowest = value;
        above_bucket += value_weight;
    }
    return lowest;
}

// The tokens of a row that may be drawn.
struct Survivors {
    int64_t* token_ids;
    float* x;
    int64_t count;

    template <class Keep>
    void keep(Keep keep) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (!keep(x[i])) continue;
            token_ids[kept] = token_ids[i];
            x[kept++] = x[i];
        }
        count = kept;
    }
};

// First words of Philox 4x32-10 of counters (sample_index, position, token_id).
inline void philox_words(uint64_t seed, uint32_t sample_index, uint64_t position, const int64_t* token_ids,
                         int64_t count, uint32_t* words) {
    uint32_t c0[kVectorBlock], c1[kVectorBlock], c2[kVectorBlock], c3[kVectorBlock];
    for (int64_t i = 0; i < kVectorBlock; ++i) {
        c0[i] = sample_index;
        c1[i] = static_cast<uint32_t>(position);
        c2[i] = static_cast<uint32_t>(position >> 32);
        c3[i] = i < count ? static_cast<uint32_t>(token_ids[i]) : 0;
    }
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int64_t i = 0; i < kVectorBlock; ++i) {
            const uint64_t even = uint64_t{0xD2511F53u} * c0[i], odd = uint64_t{0xCD9E8D57u} * c2[i];
            c0[i] = static_cast<uint32_t>(odd >> 32) ^ c1[i] ^ k0;
            c2[i] = static_cast<uint32_t>(even >> 32) ^ c3[i] ^ k1;
            c1[i] = static_cast<uint32_t>(odd);
            c3[i] = static_cast<uint32_t>(even);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    std::copy_n(c0, kVectorBlock, words);
}

// -log(-log1p(-u)) of words / 2**32, in place of the words.
inline void gumbel(const uint32_t* words, float* noise) {
    const Floats one = Vec::broadcast(1.0f);
    for (int64_t i = 0; i < kVectorBlock; ++i) noise[i] = static_cast<float>(static_cast<int32_t>(words[i] >> 1));
    for (int64_t i = 0; i < kVectorBlock; i += kLanes) {
        Floats u = Vec::mul(Vec::load(noise + i), Vec::broadcast(0x1p-31f));
        u = Vec::min(Vec::max(u, Vec::broadcast(0x1p-31f)), Vec::broadcast(1.0f - 0x1p-24f));
        // log1p: the quotient makes up for the rounding of 1 - u (Kahan).
        const Floats rest = Vec::sub(one, u);
        const Floats correction = Vec::div(u, Vec::sub(one, rest));
        const Floats exponential = Vec::where_less(rest, one, negative(Vec::mul(log(rest), correction)), u);
        Vec::store(noise + i, negative(log(exponential)));
    }
}

class SampleRow {
   public:
    SampleRow(const SampleCall& call, int64_t row) : call_(call), row_(row), vocab_size_(call.vocab_size) {}

    int64_t draw() {
        const float* scores = processed();
        const Best best = best_of(scores, vocab_size_);
        if (!std::isfinite(best.value)) return -1;
        if (!(call_.temperature[row_] > 0)) return best.index;
        return drawn(filtered(scores, best.value));
    }

    struct Best {
        float value;  // NaN where any is
        int64_t index;
    };
    static Best best_of(const float* x, int64_t count) {
        Floats highest = Vec::broadcast(-std::numeric_limits<float>::infinity()), any_nan = Vec::zero();
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            const Floats value = Vec::load(x + i);
            highest = Vec::max(value, highest);
            any_nan = Vec::add(any_nan, Vec::mul(value, Vec::zero()));
        }
        // Infinity times 0 is NaN as well: -inf is an ordinary forbidden token, so only then every value is looked at.
        float maximum = Vec::highest(highest);
        bool nan = false;
        if (const float probe = Vec::sum(any_nan); probe != probe) {
            for (int64_t j = 0; j < i; ++j) nan |= x[j] != x[j];
        }
        for (; i < count; ++i) {
            nan |= x[i] != x[i];
            maximum = std::max(maximum, x[i]);
        }
        if (nan) return {std::numeric_limits<float>::quiet_NaN(), -1};
        return {maximum, std::find(x, x + count, maximum) - x};
    }

   private:
    // Penalties, then bias.
    const float* processed() const {
        const float* logits = call_.logits + row_ * call_.logits_stride;
        const bool* in_prompt = call_.prompt_mask == nullptr ? nullptr : call_.prompt_mask + row_ * vocab_size_;
        const int32_t* counts = call_.output_counts == nullptr ? nullptr : call_.output_counts + row_ * vocab_size_;
        const float* bias = call_.bias == nullptr ? nullptr : call_.bias + row_ * vocab_size_;
        if (in_prompt == nullptr && counts == nullptr && bias == nullptr) return logits;
        float* scores = scratch<float>(kProcessed, vocab_size_);
        const float penalty = call_.repetition_penalty[row_];
        const float frequency = call_.frequency_penalty[row_], presence = call_.presence_penalty[row_];
        for (int64_t i = 0; i < vocab_size_; ++i) {
            float score = logits[i];
            const bool generated = counts != nullptr && counts[i] > 0;
            if (generated || (in_prompt != nullptr && in_prompt[i])) {
                score = score < 0 ? score * penalty : score / penalty;
            }
            if (counts != nullptr) {
                score = score - frequency * static_cast<float>(counts[i]);
                score = score - presence * static_cast<float>(generated);
            }
            scores[i] = bias == nullptr ? score : score + bias[i];
        }
        return scores;
    }

    Survivors filtered(const float* scores, float maximum) const {
        Survivors survivors{scratch<int64_t>(kTokenIds, vocab_size_), scratch<float>(kSurvivors, vocab_size_ + kLanes),
                            0};
        const float temperature = call_.temperature[row_];
        for (int64_t i = 0; i < vocab_size_; ++i) {
            // Subtracting first keeps the leading scores exact however small the temperature.
            const float x = (scores[i] - maximum) / temperature;
            survivors.token_ids[survivors.count] = i;
            survivors.x[survivors.count] = x;
            survivors.count += x > -std::numeric_limits<float>::infinity();
        }
        if (const int64_t top_k = call_.top_k[row_]; 0 < top_k && top_k < survivors.count) {
            const auto one = [](int64_t) { return int64_t{1}; };
            const float lowest = lowest_kept(survivors.x, survivors.count, one, static_cast<double>(top_k));
            survivors.keep([=](float x) { return x >= lowest; });
        }
        if (call_.top_p[row_] < 1) {
            int64_t* mass = scratch<int64_t>(kMass, survivors.count);
            fill_mass(survivors.x, survivors.count, mass);
            const int64_t total = std::accumulate(mass, mass + survivors.count, int64_t{0});
            const double limit = static_cast<double>(call_.top_p[row_]) * static_cast<double>(total);
            const float lowest = lowest_kept(survivors.x, survivors.count, [=](int64_t i) { return mass[i]; }, limit);
            survivors.keep([=](float x) { return x >= lowest; });
        }
        if (const float min_p = call_.min_p[row_]; min_p > 0) {
            survivors.keep([=](float x) { return exp(x) >= min_p; });
        }
        return survivors;
    }

    int64_t drawn(const Survivors& survivors) const {
        float best = -std::numeric_limits<float>::infinity();
        int64_t token_id = -1;
        uint32_t words[kVectorBlock];
        float noise[kVectorBlock];
        for (int64_t first = 0; first < survivors.count; first += kVectorBlock) {
            const int64_t count = std::min(kVectorBlock, survivors.count - first);
            philox_words(static_cast<uint64_t>(call_.seeds[row_]), static_cast<uint32_t>(call_.sample_index[row_]),
                         static_cast<uint64_t>(call_.position[row_]), survivors.token_ids + first, count, words);
            gumbel(words, noise);
            for (int64_t i = 0; i < count; ++i) {
                const float score = survivors.x[first + i] + noise[i];
                if (!(score > best)) continue;  // of equal scores the lowest id
                best = score;
                token_id = survivors.token_ids[first + i];
            }
        }
        return token_id;
    }

    const SampleCall& call_;
    int64_t row_, vocab_size_;
};

inline void sample(const SampleCall& call) {
    parallel_for(call.num_rows, call.num_threads, [&](int64_t row) { call.tokens[row] = SampleRow(call, row).draw(); });
}

inline void log_probs_of_row(const LogProbsCall& call, int64_t row) {
    const float* logits = call.logits + row * call.logits_stride;
    float* top_values = call.top_values + row * call.num_top;
    int64_t* top_ids = call.top_ids + row * call.num_top;
    const int64_t chosen = call.token_ids[row];
    if (chosen < 0 || chosen >= call.vocab_size)
        throw std::out_of_range("log_probs: a token id is not in the vocabulary");
    const SampleRow::Best best = SampleRow::best_of(logits, call.vocab_size);
    if (!std::isfinite(best.value)) {
        call.chosen[row] = std::numeric_limits<float>::quiet_NaN();
        call.ranks[row] = 0;
        std::fill_n(top_values, call.num_top, std::numeric_limits<float>::quiet_NaN());
        std::fill_n(top_ids, call.num_top, int64_t{-1});
        return;
    }
    float* x = scratch<float>(kSurvivors, call.vocab_size + kLanes);
    int64_t* mass = scratch<int64_t>(kMass, call.vocab_size);
    for (int64_t i = 0; i < call.vocab_size; ++i) x[i] = logits[i] - best.value;
    fill_mass(x, call.vocab_size, mass);
    const int64_t total = std::accumulate(mass, mass + call.vocab_size, int64_t{0});
    const double log_sum = std::log(static_cast<double>(total) / kMassOne);
    call.chosen[row] = static_cast<float>(static_cast<double>(x[chosen]) - log_sum);
    int64_t rank = 1;
    for (int64_t i = 0; i < call.vocab_size; ++i) rank += x[i] > x[chosen] || (x[i] == x[chosen] && i < chosen);
    call.ranks[row] = rank;
    if (call.num_top == 0) return;
    const auto one = [](int64_t) { return int64_t{1}; };
    const float lowest = lowest_kept(x, call.vocab_size, one, static_cast<double>(call.num_top));
    std::vector<int64_t> top;
    for (int64_t i = 0; i < call.vocab_size; ++i) {
        if (x[i] >= lowest) top.push_back(i);
    }
    std::stable_sort(top.begin(), top.end(), [x](int64_t a, int64_t b) { return x[a] > x[b]; });
    for (int64_t i = 0; i < call.num_top; ++i) {
        top_values[i] = static_cast<float>(static_cast<double>(x[top[i]]) - log_sum);
        top_ids[i] = top[i];
    }
}

inline void log_probs(const LogProbsCall& call) {
    parallel_for(call.num_rows, call.num_threads, [&](int64_t row) { log_probs_of_row(call, row); });
}
