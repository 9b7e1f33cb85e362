// linear: out = epilogue(norm(x) @ weight.T + bias), from the checkpoint's row-major weights.
//
// Sums     An output's are taken over in_features in one order (dense.h, int4.h) in the lanes of a register, which are
//          summed once at the end. The tile around an output only decides which others are computed beside it: a row's
//          bits are the same for any number of rows or threads, so one kernel serves prompt and generated tokens.
// Traffic  Threads take blocks of outputs whose weights fit L2: for kGroupRows rows a weight is read from memory once.
// Routes   x is normed and laid out as registers in the order in which a tile reads them. For few rows the weights are
//          read where they lie; for many they are laid out likewise, a block at a time: widened once, not once a row
//          tile, and free of rows that compete for the same cache sets (in_features is often a power of two).
// Rounding As llama_fast/ops/reference.py: to T where an unfused op would store.

// function(number of rows, as a type), for 1 to kMost of them.
template <int kMost, class Function>
void with_height(int rows, const Function& function) {
    if constexpr (kMost > 1) {
        if (rows < kMost) return with_height<kMost - 1>(rows, function);
    }
    function(std::integral_constant<int, kMost>());
}

// One call: x laid out, then blocks of outputs. Source: a weight's format and the dtype beside it (Dense, Int4).
template <class Source>
class Linear {
   public:
    explicit Linear(const LinearCall& call)
        : call_(call),
          weight_(*call.weight),
          source_(weight_),
          width_(weight_.in_features),
          registers_(source_.registers()),
          packed_(call.num_rows >= Source::packed_from),
          gate_up_(call.epilogue == Epilogue::gate_up),
          outputs_(gate_up_ ? weight_.parts[0].out_features : weight_.out_features()),
          tile_rows_(packed_ ? kPackedTileRows : Source::direct_rows),
          tiles_((call.num_rows + tile_rows_ - 1) / tile_rows_),
          depth_(packed_ ? kPackedDepth : registers_) {}

    void run() {
        Register* x = scratch<Register>(kLaidOutRows, call_.num_rows * registers_);
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
    using T = typename Source::Element;
    using Register = typename Source::Register;
    using Block = typename Source::Block;

    // Row tiles of nearly equal height: a last one of a single row would read the weights for too little work.
    int64_t first_row(int64_t tile) const { return tile * call_.num_rows / tiles_; }
    int height(int64_t tile) const { return static_cast<int>(first_row(tile + 1) - first_row(tile)); }

    // Where a tile's registers from `first` on lie: blocks of depth_, in each the tiles one after the other.
    const Register* laid_out(int64_t tile, int64_t first) const {
        return x_ + first * call_.num_rows + first_row(tile) * std::min(depth_, registers_ - first);
    }

    void lay_out_rows(int64_t tile, Register* x) const {
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
            source_.lay_out_x(rows, stride, height(tile), first, count, x + first * call_.num_rows + row * count);
        }
    }

    // Outputs of a task: their weights stay in L2 while row after row takes them.
    int64_t block_columns() const {
        const int64_t unit = packed_ ? kPackedColumns : kDirectUnit;
        const int64_t bytes = std::max<int64_t>(1, source_.bytes_a_column());
        const int64_t fair_share = outputs_ / (4 * call_.num_threads);
        const int64_t in_cache = packed_ ? kPackedBlockColumns : kDirectBlockBytes / bytes / (gate_up_ ? 2 : 1);
        return std::clamp(std::min(in_cache, fair_share) / unit * unit, unit, kMaxBlockColumns);
    }

    void multiply_direct(int64_t part, int64_t first, int64_t columns) const {
        constexpr int R = Source::direct_rows;
        float sums[R][kMaxBlockColumns], up_sums[R][kMaxBlockColumns];
        const Block block = source_.block(weight_.parts[part], first, columns, false);
        const Block up_block = gate_up_ ? source_.block(weight_.parts[1], first, columns, true) : block;
        for (int64_t tile = 0; tile < tiles_; ++tile) {
            with_height<R>(height(tile), [&](auto rows) {
                source_.template direct<rows()>(block, laid_out(tile, 0), sums[0], kMaxBlockColumns);
                if (gate_up_)
                    source_.template direct<rows()>(up_block, laid_out(tile, 0), up_sums[0], kMaxBlockColumns);
            });
            for (int r = 0; r < height(tile); ++r)
                finish(first_row(tile) + r, part, first, columns, sums[r], up_sums[r]);
        }
    }

    void multiply_packed(int64_t part, int64_t first, int64_t columns) const {
        const int64_t column_tiles = (columns + kPackedColumns - 1) / kPackedColumns;
        const int64_t tile_sums = kPackedTileRows * kPackedColumns, all_sums = tiles_ * column_tiles * tile_sums;
        Floats* sums = scratch<Floats>(kTileSums, all_sums * (gate_up_ ? 2 : 1));
        packed(source_.block(weight_.parts[part], first, columns, false), sums);
        if (gate_up_) packed(source_.block(weight_.parts[1], first, columns, true), sums + all_sums);
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
    void packed(const Block& block, Floats* sums) const {
        const int64_t columns = block.columns, column_tiles = (columns + kPackedColumns - 1) / kPackedColumns;
        constexpr int64_t tile_sums = kPackedTileRows * kPackedColumns;
        std::fill_n(sums, tiles_ * column_tiles * tile_sums, Vec::zero());
        Register* weight = scratch<Register>(kLaidOutWeight, depth_ * column_tiles * kPackedColumns);
        for (int64_t k = 0; k < registers_; k += depth_) {
            const int64_t depth = std::min(depth_, registers_ - k);
            for (int64_t c = 0; c < column_tiles; ++c) {
                Register* target = weight + c * kPackedColumns * depth;
                if ((c + 1) * kPackedColumns > columns) {
                    std::memset(target, 0, kPackedColumns * depth * sizeof(Register));
                }
                source_.lay_out_weights(block, c * kPackedColumns, k, depth, target);
            }
            // The next registers of the weights come while these are multiplied: they lie in pieces of less than a
            // page, for which the hardware's prefetch is late.
            const int64_t next = k + depth < registers_ ? k + depth : 0;
            for (int64_t tile = 0; tile < tiles_; ++tile) {
                for (int64_t c = tile * columns / tiles_; c < (tile + 1) * columns / tiles_; ++c) {
                    prefetch(source_.bytes(block, c, next, depth));
                }
                const Register* x = laid_out(tile, k);
                with_height<kPackedTileRows>(height(tile), [&](auto rows) {
                    for (int64_t c = 0; c < column_tiles; ++c) {
                        source_.template packed<rows()>(block, c * kPackedColumns, k, depth, x,
                                                        weight + c * kPackedColumns * depth,
                                                        sums + (tile * column_tiles + c) * tile_sums);
                    }
                });
            }
        }
    }

    // Into L2.
    static void prefetch(std::pair<const void*, int64_t> bytes) {
        const char* first = static_cast<const char*>(bytes.first);
        for (int64_t i = 0; i < bytes.second; i += 64) _mm_prefetch(first + i, _MM_HINT_T1);
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
    const Source source_;
    int64_t width_, registers_;
    bool packed_, gate_up_;
    int64_t outputs_, tile_rows_, tiles_, depth_;
    const Register* x_ = nullptr;
};

template <class Source>
void linear_of(const LinearCall& call) {
    using T = typename Source::Element;
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
        Linear<Source>(part).run();
    }
}

template <class T>
void linear(const LinearCall& call) {
    call.weight->group_size == 0 ? linear_of<Dense<T>>(call) : linear_int4<T>(call);
}
