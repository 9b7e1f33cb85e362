// Weights of `linear` as 4-bit integers: (value - zero) * scale, read where the file's words lie.
//
// Order    Nibble i of a row's word l is input feature 8 * l + i. A register of words gives `phases` registers of
//          integers, one for each nibble of its lanes (the vector headers' Nibbles); x is laid out in that order once.
// Sums     Within a group a fresh register of integers times x; then one fused multiply-add with the scale into the
//          output's register. A lane belongs to one group: where a register of words covers several, so does one of
//          scales. The zero is subtracted from the integer, which is exact: a large x whose weight is zero adds
//          nothing.
// Routes   Words are unpacked in registers for the rows of a tile; for many rows once, into registers that all rows
//          read. The sums are taken in the same order.

template <class Source>
void linear_of(const LinearCall& call);

// What is summed before it is scaled: registers of kLanes words each, and scales that their lanes have.
template <int kGroupWords>
struct Span {
    static constexpr int chunks = std::max(1, kGroupWords / kLanes);
    static constexpr int scales = std::max(1, kLanes / kGroupWords);
};

// Some outputs of a part; scales and zeros are widened, stride apart from column to column.
struct Int4Block {
    const uint32_t* words;
    const float* scales;
    const float* zeros;  // null: 8 throughout
    int64_t stride, columns;
};

// The first `count` < kLanes words of a register, zeros behind them.
struct PartialWords {
    alignas(64) uint32_t words[kLanes] = {};
    PartialWords(const uint32_t* source, int64_t count) { std::memcpy(words, source, count * sizeof(uint32_t)); }
};

// sums[R][C] (rows sums_stride apart) of R laid out rows of x and C columns from `column` on, words where they lie.
template <class Op, int kGroupWords, bool kZeros, int R, int C>
void int4_direct_tile(const Int4Block& block, int64_t column, int64_t num_words, const typename Op::Register* x,
                      float* sums, int64_t sums_stride) {
    constexpr int chunks = Span<kGroupWords>::chunks;
    const uint32_t* words = block.words + column * num_words;
    const float* scales = block.scales + column * block.stride;
    const float* zeros = kZeros ? block.zeros + column * block.stride : nullptr;
    Floats sum[R][C], total[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) total[r][c] = Vec::zero();
    }
    const auto start = [&]() __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) sum[r][c] = Vec::zero();
        }
    };
    const auto add = [&](int c, const uint32_t* source) __attribute__((always_inline)) {
        const auto multiply = [&](auto value, auto phase) __attribute__((always_inline)) {
            for (int r = 0; r < R; ++r) sum[r][c] = Op::multiply_add(value, x[phase() * R + r], sum[r][c]);
        };
        Op::template unpack<kGroupWords, kZeros>(source, kZeros ? zeros + c * block.stride : nullptr, multiply);
    };
    const auto finish = [&]() __attribute__((always_inline)) {
        for (int c = 0; c < C; ++c) {
            const Floats scale = spread<kGroupWords>(scales + c * block.stride);
            for (int r = 0; r < R; ++r) total[r][c] = Vec::multiply_add(sum[r][c], scale, total[r][c]);
        }
        scales += Span<kGroupWords>::scales;
        if constexpr (kZeros) zeros += Span<kGroupWords>::scales;
    };
    int64_t k = 0;
    for (; k + kLanes * chunks <= num_words; k += kLanes * chunks) {
        start();
        for (int chunk = 0; chunk < chunks; ++chunk) {
            for (int c = 0; c < C; ++c) {
                const uint32_t* here = words + c * num_words + k + chunk * kLanes;
                // The next tile's: unpacking leaves the hardware's own prefetch behind (cpu-experiments.md).
                _mm_prefetch(reinterpret_cast<const char*>(here + C * num_words), _MM_HINT_T0);
                add(c, here);
            }
            x += R * Op::phases;
        }
        finish();
    }
    if (k < num_words) {  // less than a register: a span of several ends with its group
        start();
        for (int c = 0; c < C; ++c) add(c, PartialWords(words + c * num_words + k, num_words - k).words);
        finish();
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sums[r * sums_stride + c] = Vec::sum(total[r][c]);
    }
}

// sums [R][C] += `count` registers of R rows of x and C columns, both laid out; scales of the first span.
template <class Op, int kGroupWords, int R, int C>
void int4_packed_tile(const typename Op::Register* x, const typename Op::Register* weight, int64_t count,
                      const float* scales, int64_t stride, Floats* sums) {
    constexpr int registers = Span<kGroupWords>::chunks * Op::phases;
    for (; count > 0; count -= registers) {
        Floats sum[R][C];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) sum[r][c] = Vec::zero();
        }
        for (int i = 0; i < registers; ++i) {
            typename Op::Register w[C];
            for (int c = 0; c < C; ++c) w[c] = weight[c];
            for (int r = 0; r < R; ++r) {
                const typename Op::Register value = x[r];
                for (int c = 0; c < C; ++c) sum[r][c] = Op::multiply_add(w[c], value, sum[r][c]);
            }
            weight += C;
            x += R;
        }
        for (int c = 0; c < C; ++c) {
            const Floats scale = spread<kGroupWords>(scales + c * stride);
            for (int r = 0; r < R; ++r) {
                sums[r * C + c] = Vec::multiply_add(sum[r][c], scale, sums[r * C + c]);
            }
        }
        scales += Span<kGroupWords>::scales;
    }
}

// What `Linear` asks of a weight's format; T is x's and the scales' dtype, Op unpacks.
template <class T, class Op, int kGroupWords>
class Int4 {
   public:
    using Element = T;
    using Register = typename Op::Register;
    using Block = Int4Block;
    static constexpr int direct_rows = kInt4Rows;
    static constexpr int64_t packed_from = kInt4PackedRows;

    explicit Int4(const LinearWeight& weight)
        : width_(weight.in_features), num_words_(width_ / 8), groups_(num_words_ / kGroupWords) {}

    int64_t registers() const { return round_up(num_words_, kLanes) / kLanes * Op::phases; }
    int64_t bytes_a_column() const { return num_words_ * sizeof(uint32_t); }

    // `second`: beside another block that is in use.
    Block block(const LinearPart& part, int64_t first, int64_t columns, bool second) const {
        const int64_t stride = round_up(groups_, Span<kGroupWords>::scales);
        // A packed tile reads scales of columns that are not there.
        const int64_t size = round_up(columns, kPackedColumns) * stride;
        float* scales = scratch<float>(second ? kSecondScales : kScales, 2 * size);
        float* zeros = part.zeros == nullptr ? nullptr : scales + size;
        std::fill_n(scales, 2 * size, 0.0f);
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t row = (first + c) * groups_;
            for_lanes(groups_, [&](int64_t i, auto load, auto store) {
                store(scales + c * stride + i, load(static_cast<const T*>(part.scales) + row + i));
            });
            if (zeros == nullptr) continue;
            for (int64_t i = 0; i < groups_; ++i) zeros[c * stride + i] = std::min<int>(part.zeros[row + i], 16);
        }
        return {static_cast<const uint32_t*>(part.weight) + first * num_words_, scales, zeros, stride, columns};
    }

    void lay_out_x(const T* rows, int64_t stride, int64_t num_rows, int64_t first, int64_t count,
                   Register* target) const {
        for (int64_t r = 0; r < num_rows; ++r) {
            for (int64_t i = 0; i < count; i += Op::phases) {
                const int64_t k = (first + i) / Op::phases * 8 * kLanes;
                lay_out_chunk(rows + r * stride + k, std::min<int64_t>(8 * kLanes, width_ - k), num_rows,
                              target + i * num_rows + r);
            }
        }
    }

    void lay_out_weights(const Block& block, int64_t column, int64_t first, int64_t count, Register* target) const {
        if constexpr (Op::template takes_zeros<kGroupWords>) {
            if (block.zeros != nullptr) return unpack<true>(block, column, first, count, target);
        }
        unpack<false>(block, column, first, count, target);
    }

    template <int R>
    void direct(const Block& block, const Register* x, float* sums, int64_t stride) const {
        if constexpr (Op::template takes_zeros<kGroupWords>) {
            if (block.zeros != nullptr) return direct_columns<true, R>(block, x, sums, stride);
        }
        direct_columns<false, R>(block, x, sums, stride);
    }

    template <int R>
    void packed(const Block& block, int64_t column, int64_t first, int64_t count, const Register* x,
                const Register* weight, Floats* sums) const {
        const float* scales = block.scales + column * block.stride + first_scale(first);
        int4_packed_tile<Op, kGroupWords, R, kPackedColumns>(x, weight, count, scales, block.stride, sums);
    }

    std::pair<const void*, int64_t> bytes(const Block& block, int64_t column, int64_t first, int64_t count) const {
        return {block.words + column * num_words_ + first / Op::phases * kLanes, count / Op::phases * kLanes * 4};
    }

   private:
    static constexpr int kRegisters = Span<kGroupWords>::chunks * Op::phases;  // of a span
    static_assert(kPackedDepth % kRegisters == 0);

    static int64_t first_scale(int64_t first) { return first / kRegisters * Span<kGroupWords>::scales; }

    // `count` numbers of x, and zeros for the rest of 8 * kLanes, -> target [phases], `step` apart.
    static void lay_out_chunk(const T* x, int64_t count, int64_t step, Register* target) {
        using Number = typename Op::Number;
        constexpr int width = sizeof(Register) / sizeof(Number);
        alignas(64) Number numbers[8 * kLanes] = {}, lanes[Op::phases][width];
        if constexpr (std::is_same_v<Number, T>) {
            std::memcpy(numbers, x, count * sizeof(T));
        } else {
            for_lanes(count, [&](int64_t i, auto load, auto store) { store(numbers + i, load(x + i)); });
        }
        for (int phase = 0; phase < Op::phases; ++phase) {
            for (int lane = 0; lane < width; ++lane) lanes[phase][lane] = numbers[Op::feature(phase, lane)];
            std::memcpy(target + phase * step, lanes[phase], sizeof(Register));
        }
    }

    template <bool kZeros, int R>
    void direct_columns(const Block& block, const Register* x, float* sums, int64_t stride) const {
        constexpr int C = kInt4Columns[R];
        int64_t c = 0;
        for (; c + C <= block.columns; c += C) {
            int4_direct_tile<Op, kGroupWords, kZeros, R, C>(block, c, num_words_, x, sums + c, stride);
        }
        for (; c < block.columns; ++c) {
            int4_direct_tile<Op, kGroupWords, kZeros, R, 1>(block, c, num_words_, x, sums + c, stride);
        }
    }

    template <bool kZeros>
    void unpack(const Block& block, int64_t column, int64_t first, int64_t count, Register* target) const {
        const int64_t present = std::min<int64_t>(kPackedColumns, block.columns - column);
        for (int64_t c = 0; c < present; ++c) {
            const uint32_t* words = block.words + (column + c) * num_words_;
            const float* zeros = kZeros ? block.zeros + (column + c) * block.stride : nullptr;
            for (int64_t i = 0; i < count; i += Op::phases) {
                const int64_t k = (first + i) / Op::phases * kLanes;
                const float* zero = kZeros ? zeros + first_scale(first + i) : nullptr;
                const auto put = [&](const uint32_t* source) __attribute__((always_inline)) {
                    const auto store = [&](Register value, auto phase) __attribute__((always_inline)) {
                        target[(i + phase()) * kPackedColumns + c] = value;
                    };
                    Op::template unpack<kGroupWords, kZeros>(source, zero, store);
                };
                k + kLanes <= num_words_ ? put(words + k) : put(PartialWords(words + k, num_words_ - k).words);
            }
        }
    }

    int64_t width_, num_words_, groups_;
};

template <class T, class Op>
void linear_int4_by(const LinearCall& call) {
    switch (call.weight->group_size) {
        case 32:
            return linear_of<Int4<T, Op, 4>>(call);
        case 64:
            return linear_of<Int4<T, Op, 8>>(call);
        default:
            return linear_of<Int4<T, Op, 16>>(call);
    }
}

template <class T>
void linear_int4(const LinearCall& call) {
#ifdef WITH_AVX512_BF16
    if constexpr (std::is_same_v<T, bf16>) {
        const bool has_zeros = std::any_of(call.weight->parts.begin(), call.weight->parts.end(),
                                           [](const LinearPart& part) { return part.zeros != nullptr; });
        if (!has_zeros || call.weight->group_size == 128) return linear_int4_by<T, Bf16Nibbles>(call);
    }
#endif
    linear_int4_by<T, FloatNibbles>(call);
}
