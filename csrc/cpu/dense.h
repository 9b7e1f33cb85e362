// Weights of `linear` in the checkpoint's dtype: read where they lie, or laid out as registers a slice at a time.
//
// Sums     One register of partial sums an output, taken over in_features in order.

template <class T>
using Register = typename Operand<T>::Register;

// Registers [first, first + count) of num_rows rows -> target [count, tile] (num_rows at most tile).
template <class T>
void lay_out(const T* rows, int64_t stride, int64_t width, int64_t num_rows, int64_t tile, int64_t first, int64_t count,
             Register<T>* target) {
    using Op = Operand<T>;
    for (int64_t r = 0; r < num_rows; ++r) {
        const T* row = rows + r * stride;
        Register<T>* place = target + r;
        int64_t k = first / Op::phases * Op::step;
        const auto put = [&](const T* step) {
            const typename Op::Raw raw = Op::load(step);
            *place = Op::template take<0>(raw);
            if constexpr (Op::phases == 2) *(place += tile) = Op::template take<1>(raw);
            place += tile;
        };
        const int64_t end = k + count / Op::phases * Op::step;
        for (; k + Op::step <= std::min(end, width); k += Op::step) put(row + k);
        if (k < end) {
            T tail[Op::step] = {};
            std::memcpy(tail, row + k, (width - k) * sizeof(T));
            put(tail);
        }
    }
}

// sums[R][C] (rows sums_stride apart) of R laid out rows of x and C rows of weight where they lie.
template <class T, int R, int C>
void direct_tile(const Register<T>* x, const T* weight, int64_t width, float* sums, int64_t sums_stride) {
    using Op = Operand<T>;
    Floats sum[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sum[r][c] = Vec::zero();
    }
    const auto add = [&](int c, typename Op::Raw raw) __attribute__((always_inline)) {
        const Register<T> first = Op::template take<0>(raw);
        for (int r = 0; r < R; ++r) sum[r][c] = Op::multiply_add(first, x[r], sum[r][c]);
        if constexpr (Op::phases == 2) {
            const Register<T> second = Op::template take<1>(raw);
            for (int r = 0; r < R; ++r) sum[r][c] = Op::multiply_add(second, x[R + r], sum[r][c]);
        }
    };
    int64_t k = 0;
    for (; k + Op::step <= width; k += Op::step) {
        for (int c = 0; c < C; ++c) {
            // The next tile's: a row is often one 4 KiB page, where the hardware's prefetch starts anew.
            if constexpr (kDirectPrefetch) {
                _mm_prefetch(reinterpret_cast<const char*>(weight + (C + c) * width + k), _MM_HINT_T0);
            }
            add(c, Op::load(weight + c * width + k));
        }
        x += R * Op::phases;
    }
    if (k < width) {
        for (int c = 0; c < C; ++c) {
            T tail[Op::step] = {};
            std::memcpy(tail, weight + c * width + k, (width - k) * sizeof(T));
            add(c, Op::load(tail));
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sums[r * sums_stride + c] = Vec::sum(sum[r][c]);
    }
}

// sums [R][C] += `count` registers of R rows of x and C rows of weight, both laid out.
template <class T, int R, int C>
void packed_tile(const Register<T>* x, const Register<T>* weight, int64_t count, Floats* sums) {
    Floats sum[R][C];
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sum[r][c] = sums[r * C + c];
    }
    for (; count > 0; --count) {
        Register<T> w[C];
        for (int c = 0; c < C; ++c) w[c] = weight[c];
        for (int r = 0; r < R; ++r) {
            const Register<T> value = x[r];
            for (int c = 0; c < C; ++c) sum[r][c] = Operand<T>::multiply_add(w[c], value, sum[r][c]);
        }
        weight += C;
        x += R;
    }
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) sums[r * C + c] = sum[r][c];
    }
}

// What `Linear` asks of a weight's format.
template <class T>
class Dense {
   public:
    using Element = T;
    using Register = typename Operand<T>::Register;
    static constexpr int direct_rows = kDirectRows;  // of a tile
    static constexpr int64_t packed_from = kPackedRows;

    // Some outputs of a part.
    struct Block {
        const T* weight;
        int64_t columns;
    };

    explicit Dense(const LinearWeight& weight) : width_(weight.in_features) {}

    // Of a laid out row.
    int64_t registers() const { return round_up(width_, Op::step) / Op::step * Op::phases; }
    int64_t bytes_a_column() const { return width_ * sizeof(T); }

    Block block(const LinearPart& part, int64_t first, int64_t columns, bool) const {
        return {static_cast<const T*>(part.weight) + first * width_, columns};
    }

    // Registers [first, first + count) of rows of x -> target [count, num_rows].
    void lay_out_x(const T* rows, int64_t stride, int64_t num_rows, int64_t first, int64_t count,
                   Register* target) const {
        lay_out(rows, stride, width_, num_rows, num_rows, first, count, target);
    }

    // Those of columns [column, column + kPackedColumns), as far as there are, -> target [count, kPackedColumns].
    void lay_out_weights(const Block& block, int64_t column, int64_t first, int64_t count, Register* target) const {
        const int64_t present = std::min<int64_t>(kPackedColumns, block.columns - column);
        lay_out(block.weight + column * width_, width_, width_, present, kPackedColumns, first, count, target);
    }

    template <int R>
    void direct(const Block& block, const Register* x, float* sums, int64_t stride) const {
        constexpr int C = kDirectColumns[R];
        const T* weight = block.weight;
        int64_t c = 0;
        for (; c + C <= block.columns; c += C) direct_tile<T, R, C>(x, weight + c * width_, width_, sums + c, stride);
        for (; c < block.columns; ++c) direct_tile<T, R, 1>(x, weight + c * width_, width_, sums + c, stride);
    }

    template <int R>
    void packed(const Block&, int64_t, int64_t, int64_t count, const Register* x, const Register* weight,
                Floats* sums) const {
        packed_tile<T, R, kPackedColumns>(x, weight, count, sums);
    }

    // Where registers [first, first + count) of a column come from.
    std::pair<const void*, int64_t> bytes(const Block& block, int64_t column, int64_t first, int64_t count) const {
        constexpr int64_t step_bytes = Op::step * sizeof(T);
        return {block.weight + column * width_ + first / Op::phases * Op::step, count / Op::phases * step_bytes};
    }

   private:
    using Op = Operand<T>;

    int64_t width_;
};
