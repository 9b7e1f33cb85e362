// linear: out = epilogue(norm(x) @ weight.T + bias), from the checkpoint's row-major weights.
//
// Sums     One register of partial sums an output, taken over in_features in order and summed across its lanes once at
//          the end. The tile around an output only decides which others are computed beside it: a row's bits are the
//          same for any number of rows or threads, so one kernel serves prompt and generated tokens.
// Traffic  Threads take blocks of outputs whose weights fit L2: for kGroupRows rows a weight is read from memory once.
// Routes   x is normed and laid out as registers in the order in which a tile reads them. For few rows the weights are
//          read where they lie; for many they are laid out likewise, a block at a time: widened once, not once a row
//          tile, and free of rows that compete for the same cache sets (in_features is often a power of two).
// Rounding As llama_fast/ops/reference.py: to T where an unfused op would store.

template <class T>
using Register = typename Operand<T>::Register;

// Registers of a row of `width` elements.
template <class T>
int64_t registers_of(int64_t width) {
    return (width + Operand<T>::step - 1) / Operand<T>::step * Operand<T>::phases;
}

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

template <class T, int R>
void direct_rows(const Register<T>* x, const T* weight, int64_t width, int64_t columns, float* sums, int64_t stride) {
    constexpr int C = kDirectColumns[R];
    int64_t c = 0;
    for (; c + C <= columns; c += C) direct_tile<T, R, C>(x, weight + c * width, width, sums + c, stride);
    for (; c < columns; ++c) direct_tile<T, R, 1>(x, weight + c * width, width, sums + c, stride);
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

// One call, typed: x laid out, then blocks of outputs.
template <class T>
class Linear {
   public:
    explicit Linear(const LinearCall& call)
        : call_(call),
          weight_(*call.weight),
          width_(weight_.in_features),
          registers_(registers_of<T>(width_)),
          packed_(call.num_rows >= kPackedRows),
          gate_up_(call.epilogue == Epilogue::gate_up),
          outputs_(gate_up_ ? weight_.parts[0].out_features : weight_.out_features()),
          tile_rows_(packed_ ? kPackedTileRows : kDirectRows),
          tiles_((call.num_rows + tile_rows_ - 1) / tile_rows_),
          depth_(packed_ ? kPackedDepth : registers_) {}

    void run() {
        Register<T>* x = scratch<Register<T>>(kLaidOutRows, call_.num_rows * registers_);
        const int64_t tiles_a_task = std::max<int64_t>(1, 8 / tile_rows_);  // fewer rows are not worth waking a thread
        parallel_for((tiles_ + tiles_a_task - 1) / tiles_a_task, call_.num_threads, [&](int64_t task) {
            const int64_t end = std::min(tiles_, (task + 1) * tiles_a_task);
            for (int64_t tile = task * tiles_a_task; tile < end; ++tile) lay_out_rows(tile, x);
        });
        x_ = x;

        const int64_t block = block_columns();
        std::vector<std::pair<int64_t, int64_t>> blocks;  // part, first output
        for (size_t p = 0; p < (gate_up_ ? 1 : weight_.parts.size()); ++p) {
            for (int64_t c = 0; c < weight_.parts[p].out_features; c += block) blocks.emplace_back(p, c);
        }
        parallel_for(static_cast<int64_t>(blocks.size()), call_.num_threads, [&](int64_t task) {
            const auto [part, first] = blocks[task];
            const int64_t columns = std::min(block, weight_.parts[part].out_features - first);
            packed_ ? multiply_packed(part, first, columns) : multiply_direct(part, first, columns);
        });
    }

   private:
    using Op = Operand<T>;

    // Row tiles of nearly equal height: a last one of a single row would read the weights for too little work.
    int64_t first_row(int64_t tile) const { return tile * call_.num_rows / tiles_; }
    int height(int64_t tile) const { return static_cast<int>(first_row(tile + 1) - first_row(tile)); }

    // Where a tile's registers from `first` on lie: blocks of depth_, in each the tiles one after the other.
    const Register<T>* laid_out(int64_t tile, int64_t first) const {
        return x_ + first * call_.num_rows + first_row(tile) * std::min(depth_, registers_ - first);
    }

    void lay_out_rows(int64_t tile, Register<T>* x) const {
        const int64_t row = first_row(tile);
        const T* rows = static_cast<const T*>(call_.x) + row * call_.x_stride;
        int64_t stride = call_.x_stride;
        if (call_.norm.weight != nullptr) {
            T* normed = scratch<T>(kNormedRows, height(tile) * width_);
            for (int r = 0; r < height(tile); ++r) {
                norm_row(rows + r * stride, static_cast<const T*>(call_.norm.weight), call_.norm.eps, width_,
                         normed + r * width_);
            }
            rows = normed;
            stride = width_;
        }
        for (int64_t first = 0; first < registers_; first += depth_) {
            const int64_t count = std::min(depth_, registers_ - first);
            lay_out(rows, stride, width_, height(tile), height(tile), first, count,
                    x + first * call_.num_rows + row * count);
        }
    }

    // Outputs of a task: their weights stay in L2 while row after row takes them.
    int64_t block_columns() const {
        const int64_t unit = packed_ ? kPackedColumns : kDirectUnit;
        const int64_t bytes = std::max<int64_t>(1, width_ * sizeof(T));
        const int64_t fair_share = outputs_ / (4 * call_.num_threads);
        const int64_t in_cache = packed_ ? kPackedBlockColumns : kDirectBlockBytes / bytes / (gate_up_ ? 2 : 1);
        return std::clamp(std::min(in_cache, fair_share) / unit * unit, unit, kMaxBlockColumns);
    }

    void multiply_direct(int64_t part, int64_t first, int64_t columns) const {
        float sums[kDirectRows][kMaxBlockColumns], up_sums[kDirectRows][kMaxBlockColumns];
        for (int64_t tile = 0; tile < tiles_; ++tile) {
            direct(tile, part, first, columns, sums[0]);
            if (gate_up_) direct(tile, 1, first, columns, up_sums[0]);
            for (int r = 0; r < height(tile); ++r)
                finish(first_row(tile) + r, part, first, columns, sums[r], up_sums[r]);
        }
    }

    void direct(int64_t tile, int64_t part, int64_t first, int64_t columns, float* sums) const {
        const T* weight = static_cast<const T*>(weight_.parts[part].weight) + first * width_;
        const Register<T>* x = laid_out(tile, 0);
        static_assert(kDirectRows <= 5);
        switch (height(tile)) {
            case 1:
                return direct_rows<T, 1>(x, weight, width_, columns, sums, kMaxBlockColumns);
            case 2:
                return direct_rows<T, 2>(x, weight, width_, columns, sums, kMaxBlockColumns);
            case 3:
                return direct_rows<T, 3>(x, weight, width_, columns, sums, kMaxBlockColumns);
            case 4:
                if constexpr (kDirectRows >= 4) {
                    return direct_rows<T, 4>(x, weight, width_, columns, sums, kMaxBlockColumns);
                }
                break;
            default:
                if constexpr (kDirectRows >= 5) {
                    return direct_rows<T, 5>(x, weight, width_, columns, sums, kMaxBlockColumns);
                }
        }
    }

    void multiply_packed(int64_t part, int64_t first, int64_t columns) const {
        const int64_t column_tiles = (columns + kPackedColumns - 1) / kPackedColumns;
        const int64_t tile_sums = kPackedTileRows * kPackedColumns, all_sums = tiles_ * column_tiles * tile_sums;
        Floats* sums = scratch<Floats>(kTileSums, all_sums * (gate_up_ ? 2 : 1));
        packed(part, first, columns, sums);
        if (gate_up_) packed(1, first, columns, sums + all_sums);
        float row_sums[kMaxBlockColumns + kPackedColumns], up_row_sums[kMaxBlockColumns + kPackedColumns];
        for (int64_t tile = 0; tile < tiles_; ++tile) {
            for (int r = 0; r < height(tile); ++r) {
                const Floats* row = sums + tile * column_tiles * tile_sums + r * kPackedColumns;
                sum_lanes(row, column_tiles, tile_sums, row_sums);
                if (gate_up_) sum_lanes(row + all_sums, column_tiles, tile_sums, up_row_sums);
                finish(first_row(tile) + r, part, first, columns, row_sums, up_row_sums);
            }
        }
    }

    static void sum_lanes(const Floats* row, int64_t column_tiles, int64_t tile_sums, float* out) {
        for (int64_t c = 0; c < column_tiles; ++c) {
            for (int i = 0; i < kPackedColumns; ++i) *out++ = Vec::sum(row[c * tile_sums + i]);
        }
    }

    // All rows times a block of outputs -> sums [row tiles, column tiles, tile rows, tile columns].
    void packed(int64_t part, int64_t first, int64_t columns, Floats* sums) const {
        const T* weight = static_cast<const T*>(weight_.parts[part].weight) + first * width_;
        const int64_t column_tiles = (columns + kPackedColumns - 1) / kPackedColumns;
        constexpr int64_t tile_sums = kPackedTileRows * kPackedColumns;
        std::fill_n(sums, tiles_ * column_tiles * tile_sums, Vec::zero());
        Register<T>* laid_out_weight = scratch<Register<T>>(kLaidOutWeight, depth_ * column_tiles * kPackedColumns);
        for (int64_t k = 0; k < registers_; k += depth_) {
            const int64_t depth = std::min(depth_, registers_ - k);
            for (int64_t c = 0; c < column_tiles; ++c) {
                Register<T>* target = laid_out_weight + c * kPackedColumns * depth;
                const int64_t present = std::min<int64_t>(kPackedColumns, columns - c * kPackedColumns);
                if (present < kPackedColumns) std::memset(target, 0, kPackedColumns * depth * sizeof(Register<T>));
                lay_out(weight + c * kPackedColumns * width_, width_, width_, present, kPackedColumns, k, depth,
                        target);
            }
            // The next registers of the weights come while these are multiplied: they lie in pieces of less than a
            // page, for which the hardware's prefetch is late.
            const int64_t next = (k + depth < registers_ ? k + depth : 0) / Op::phases * Op::step;
            for (int64_t tile = 0; tile < tiles_; ++tile) {
                for (int64_t c = tile * columns / tiles_; c < (tile + 1) * columns / tiles_; ++c) {
                    prefetch(weight + c * width_ + next, depth / Op::phases * Op::step);
                }
                const Register<T>* x = laid_out(tile, k);
                for (int64_t c = 0; c < column_tiles; ++c) {
                    packed_tile_of(height(tile), x, laid_out_weight + c * kPackedColumns * depth, depth,
                                   sums + (tile * column_tiles + c) * tile_sums);
                }
            }
        }
    }

    // Into L2.
    static void prefetch(const T* first, int64_t count) {
        for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) {
            _mm_prefetch(reinterpret_cast<const char*>(first + i), _MM_HINT_T1);
        }
    }

    static void packed_tile_of(int rows, const Register<T>* x, const Register<T>* weight, int64_t depth, Floats* sums) {
        static_assert(kPackedTileRows <= 5);
        switch (rows) {
            case 1:
                return packed_tile<T, 1, kPackedColumns>(x, weight, depth, sums);
            case 2:
                return packed_tile<T, 2, kPackedColumns>(x, weight, depth, sums);
            case 3:
                return packed_tile<T, 3, kPackedColumns>(x, weight, depth, sums);
            case 4:
                return packed_tile<T, 4, kPackedColumns>(x, weight, depth, sums);
            default:
                if constexpr (kPackedTileRows >= 5) return packed_tile<T, 5, kPackedColumns>(x, weight, depth, sums);
        }
    }

    // Sums of `columns` outputs of one row, from `first` of a part on -> out.
    void finish(int64_t row, int64_t part, int64_t first, int64_t columns, const float* sums,
                const float* up_sums) const {
        const auto biased = [&](Floats value, int64_t index, int64_t i, auto load) {
            const T* bias = static_cast<const T*>(weight_.parts[index].bias);
            return bias == nullptr ? value : Vec::add(value, load(bias + first + i));
        };
        int64_t place = row * outputs_ + first;
        for (int64_t p = 0; p < part; ++p) place += weight_.parts[p].out_features;
        for_lanes(columns, [&](int64_t i, auto load, auto store) {
            const Floats value = biased(load(sums + i), part, i, load);
            T* out = static_cast<T*>(call_.out) + place + i;
            switch (call_.epilogue) {
                case Epilogue::store:
                    return store(out, value);
                case Epilogue::store_float:
                    return store(static_cast<float*>(call_.out) + place + i, value);
                case Epilogue::add_residual: {
                    const Floats residual = load(static_cast<const T*>(call_.residual) + place + i);
                    return store(out, Vec::add(residual, rounded<T>(value)));
                }
                case Epilogue::gate_up: {
                    const Floats up = rounded<T>(biased(load(up_sums + i), 1, i, load));
                    return store(out, Vec::mul(activate(call_.activation, rounded<T>(value)), up));
                }
            }
        });
    }

    const LinearCall& call_;
    const LinearWeight& weight_;
    int64_t width_, registers_;
    bool packed_, gate_up_;
    int64_t outputs_, tile_rows_, tiles_, depth_;
    const Register<T>* x_ = nullptr;
};

template <class T>
void linear(const LinearCall& call) {
    // Groups of rows that stay in the caches beside the weights, which many rows can afford to read anew.
    const int64_t groups = (call.num_rows + kGroupRows - 1) / kGroupRows;
    const int64_t outputs = call.weight->out_features() / (call.epilogue == Epilogue::gate_up ? 2 : 1);
    const auto moved = [](auto* base, int64_t elements, size_t size) {
        return base == nullptr ? base
                               : reinterpret_cast<decltype(base)>(reinterpret_cast<uintptr_t>(base) + elements * size);
    };
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = group * call.num_rows / groups;
        LinearCall part = call;
        part.num_rows = (group + 1) * call.num_rows / groups - row;
        part.x = moved(call.x, row * call.x_stride, sizeof(T));
        part.residual = moved(call.residual, row * outputs, sizeof(T));
        part.out = moved(call.out, row * outputs, call.epilogue == Epilogue::store_float ? sizeof(float) : sizeof(T));
        Linear<T>(part).run();
    }
}
