// attention: causal grouped-query attention over the paged cache; a token at slot s sees slots 0..s of its sequence.
//
// Sums     Slots are taken in splits of split_size: scores, their maximum, exp and sum, then the weighted values slot
// by
//          slot. Splits' (maximum, sum, accumulator) are merged in ascending order by one formula. A row's order
//          depends on its slot alone: alone, in a batch, in a prompt of any chunking and as a generated token it has
//          one result.
// Work     A task is one KV head of some kBlockRows query rows of one sequence; its pages are widened to float once
//          for all of them. Where there are fewer tasks than threads, each split is a task and a second pass merges.
// Memory   Only slots that a row sees are read: what lies behind them may hold anything.

constexpr int64_t kBlockRows = 64;
constexpr float kMasked = -1e30f;
constexpr int64_t kMaxPartialBytes = 64 << 20;  // of splits that wait for their merge
constexpr int64_t kKeysATime = 8;               // sums that Vec::store_sums takes
constexpr int64_t kRegistersOfValues = 8;

// The rows of one task: tokens [token, token + num_tokens) of a sequence times the heads of one KV head.
struct QueryBlock {
    int64_t sequence, kv_head, token, num_tokens;
};

// A row's running softmax; accumulators lie in an array of their own.
struct Running {
    float maximum, sum;
};

template <class T>
class Attention {
   public:
    explicit Attention(const AttentionCall& call)
        : call_(call),
          group_(call.num_heads / call.pages.num_kv_heads),
          width_(round_up(call.pages.head_dim, kLanes)),
          tokens_a_block_(std::max<int64_t>(1, kBlockRows / group_)),
          scores_stride_(round_up(call.split_size, kLanes) + kLanes) {}

    void run() const {
        std::vector<QueryBlock> blocks;
        int64_t most_splits = 1;
        for (int64_t s = 0; s < call_.places.num_seqs; ++s) {
            const int64_t first = call_.places.query_starts[s], end = call_.places.query_starts[s + 1];
            for (int64_t token = first; token < end; token += tokens_a_block_) {
                const int64_t count = std::min(tokens_a_block_, end - token);
                for (int64_t head = 0; head < call_.pages.num_kv_heads; ++head)
                    blocks.push_back({s, head, token, count});
                most_splits = std::max(most_splits, splits_of(token + count - 1));
            }
        }
        // Either way gives the same bits; more tasks only keep more threads busy.
        const auto num_blocks = static_cast<int64_t>(blocks.size());
        const int64_t rows = blocks.empty() ? 0 : tokens_a_block_ * group_;
        const int64_t partial_bytes = num_blocks * most_splits * rows * width_ * static_cast<int64_t>(sizeof(float));
        if (num_blocks >= call_.num_threads || most_splits == 1 || partial_bytes > kMaxPartialBytes) {
            // The last rows of a prompt see most: taken first, they leave no thread alone at the end.
            parallel_for(num_blocks, call_.num_threads, [&](int64_t task) { attend(blocks[num_blocks - 1 - task]); });
        } else {
            attend_by_split(blocks, most_splits);
        }
    }

   private:
    int64_t splits_of(int64_t token) const { return call_.places.slots[token] / call_.split_size + 1; }
    int64_t rows_of(const QueryBlock& block) const { return block.num_tokens * group_; }
    int64_t last_token(const QueryBlock& block) const { return block.token + block.num_tokens - 1; }

    // Slots of a split that a row sees; rows are ordered by token, then head.
    int64_t visible(const QueryBlock& block, int64_t row, int64_t split) const {
        const int64_t seen = call_.places.slots[block.token + row / group_] + 1 - split * call_.split_size;
        return std::clamp<int64_t>(seen, 0, call_.split_size);
    }

    void attend(const QueryBlock& block) const {
        const int64_t rows = rows_of(block);
        auto* running = scratch<Running>(kRunnings, rows);
        auto* split_running = scratch<Running>(kPartialRunnings, rows);
        float* accumulators = scratch<float>(kAccumulators, rows * width_);
        float* partial = scratch<float>(kPartials, rows * width_);
        start(running, accumulators, rows);
        const float* q = scaled_queries(block);
        for (int64_t split = 0; split < splits_of(last_token(block)); ++split) {
            attend_split(block, q, split, split_running, partial);
            for (int64_t row = 0; row < rows; ++row) {
                if (visible(block, row, split) == 0) continue;
                merge(running[row], accumulators + row * width_, split_running[row], partial + row * width_);
            }
        }
        finish(block, running, accumulators);
    }

    void attend_by_split(const std::vector<QueryBlock>& blocks, int64_t most_splits) const {
        int64_t most_rows = 0;
        for (const QueryBlock& block : blocks) most_rows = std::max(most_rows, rows_of(block));
        const auto places = static_cast<int64_t>(blocks.size()) * most_splits * most_rows;
        auto* partials = scratch<float>(kSplitPartials, places * width_);
        auto* runnings = scratch<Running>(kSplitRunnings, places);
        const auto place = [&](int64_t block, int64_t split) { return (block * most_splits + split) * most_rows; };
        parallel_for(static_cast<int64_t>(blocks.size()) * most_splits, call_.num_threads, [&](int64_t task) {
            const int64_t index = task / most_splits, split = task % most_splits;
            const QueryBlock& block = blocks[index];
            if (split >= splits_of(last_token(block))) return;
            attend_split(block, scaled_queries(block), split, runnings + place(index, split),
                         partials + place(index, split) * width_);
        });
        parallel_for(static_cast<int64_t>(blocks.size()), call_.num_threads, [&](int64_t index) {
            const QueryBlock& block = blocks[index];
            const int64_t rows = rows_of(block);
            auto* running = scratch<Running>(kRunnings, rows);
            float* accumulators = scratch<float>(kAccumulators, rows * width_);
            start(running, accumulators, rows);
            for (int64_t split = 0; split < splits_of(last_token(block)); ++split) {
                for (int64_t row = 0; row < rows; ++row) {
                    if (visible(block, row, split) == 0) continue;
                    const int64_t from = place(index, split) + row;
                    merge(running[row], accumulators + row * width_, runnings[from], partials + from * width_);
                }
            }
            finish(block, running, accumulators);
        });
    }

    void start(Running* running, float* accumulators, int64_t rows) const {
        // Finite: exp(maximum - new maximum) is then 0, not NaN.
        std::fill_n(running, rows, Running{kMasked, 0.0f});
        std::fill_n(accumulators, rows * width_, 0.0f);
    }

    // Every merge takes this path, whichever thread found the split: one formula, one result.
    void merge(Running& running, float* accumulator, const Running& split, const float* values) const {
        const float maximum = std::max(running.maximum, split.maximum);
        const float keep = exp(running.maximum - maximum), take = exp(split.maximum - maximum);
        running.sum = running.sum * keep + split.sum * take;
        running.maximum = maximum;
        const Floats keeps = Vec::broadcast(keep), takes = Vec::broadcast(take);
        for (int64_t d = 0; d < width_; d += kLanes) {
            const Floats kept = Vec::mul(Vec::load(accumulator + d), keeps);
            Vec::store(accumulator + d, Vec::multiply_add(Vec::load(values + d), takes, kept));
        }
    }

    void finish(const QueryBlock& block, const Running* running, const float* accumulators) const {
        const int64_t head_dim = call_.pages.head_dim;
        for (int64_t row = 0; row < rows_of(block); ++row) {
            const int64_t token = block.token + row / group_, head = block.kv_head * group_ + row % group_;
            T* out = static_cast<T*>(call_.out) + (token * call_.num_heads + head) * head_dim;
            const float* accumulator = accumulators + row * width_;
            const Floats sum = Vec::broadcast(running[row].sum);
            for_lanes(head_dim,
                      [&](int64_t d, auto load, auto store) { store(out + d, Vec::div(load(accumulator + d), sum)); });
        }
    }

    // [rows, width] floats times head_dim^-0.5, zeros behind head_dim.
    const float* scaled_queries(const QueryBlock& block) const {
        const int64_t head_dim = call_.pages.head_dim, rows = rows_of(block);
        float* q = scratch<float>(kQueries, rows * width_);
        const Floats scale = Vec::broadcast(1.0f / std::sqrt(static_cast<float>(head_dim)));
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t token = block.token + row / group_, head = block.kv_head * group_ + row % group_;
            const T* source = static_cast<const T*>(call_.q) + token * call_.q_stride + head * head_dim;
            float* target = q + row * width_;
            for_lanes(head_dim,
                      [&](int64_t d, auto load, auto) { Vec::store(target + d, Vec::mul(load(source + d), scale)); });
        }
        return q;
    }

    // One split's softmax and weighted values, of a row that sees anything of it.
    void attend_split(const QueryBlock& block, const float* q, int64_t split, Running* running,
                      float* accumulators) const {
        const int64_t rows = rows_of(block), page_size = call_.pages.page_size;
        const int64_t slots = visible(block, rows - 1, split);
        float* widened = scratch<float>(kWidenedPage, round_up(page_size, kKeysATime) * width_);
        float* scores = scratch<float>(kScores, rows * scores_stride_);
        for (int64_t first = 0; first < slots; first += page_size) {
            const int64_t count = std::min(page_size, slots - first);
            widen(static_cast<const T*>(call_.pages.k) + head_of_page(block, split, first), count, widened);
            for (int64_t row = 0; row < rows; ++row) {
                if (visible(block, row, split) <= first) continue;
                score(q + row * width_, widened, count, scores + row * scores_stride_ + first);
            }
        }
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t seen = visible(block, row, split);
            if (seen > 0) running[row] = softmax(scores + row * scores_stride_, seen, seen == call_.split_size);
        }
        std::fill_n(accumulators, rows * width_, 0.0f);
        for (int64_t first = 0; first < slots; first += page_size) {
            const int64_t count = std::min(page_size, slots - first);
            widen(static_cast<const T*>(call_.pages.v) + head_of_page(block, split, first), count, widened);
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t seen = std::min(visible(block, row, split) - first, count);
                if (seen <= 0) continue;
                add_values(scores + row * scores_stride_ + first, widened, seen, accumulators + row * width_);
            }
        }
    }

    int64_t head_of_page(const QueryBlock& block, int64_t split, int64_t slot_of_split) const {
        const int64_t index = (split * call_.split_size + slot_of_split) / call_.pages.page_size;
        const int64_t page = call_.places.page_table[block.sequence * call_.places.max_pages + index];
        return page * call_.pages.page_stride + block.kv_head * call_.pages.head_stride;
    }

    // `count` slots of a head -> [count rounded up to kKeysATime, width] floats, zeros behind head_dim and count.
    void widen(const T* source, int64_t count, float* target) const {
        const int64_t head_dim = call_.pages.head_dim;
        for (int64_t slot = 0; slot < count; ++slot) {
            for_lanes(head_dim, [&](int64_t d, auto load, auto) {
                Vec::store(target + slot * width_ + d, load(source + slot * head_dim + d));
            });
        }
        std::fill(target + count * width_, target + round_up(count, kKeysATime) * width_, 0.0f);
    }

    // q . k of `count` keys, rounded up to kKeysATime.
    void score(const float* q, const float* keys, int64_t count, float* scores) const {
        for (int64_t key = 0; key < count; key += kKeysATime) {
            Floats sums[kKeysATime];
            for (Floats& sum : sums) sum = Vec::zero();
            for (int64_t d = 0; d < width_; d += kLanes) {
                const Floats query = Vec::load(q + d);
                for (int64_t i = 0; i < kKeysATime; ++i) {
                    sums[i] = Vec::multiply_add(query, Vec::load(keys + (key + i) * width_ + d), sums[i]);
                }
            }
            Vec::store_sums(scores + key, sums);
        }
    }

    // Scores [seen] -> weights exp(score - maximum) in place; their maximum and sum.
    static Running softmax(float* scores, int64_t seen, bool whole) {
        const float nothing = -std::numeric_limits<float>::infinity();
        std::fill(scores + seen, scores + round_up(seen, kLanes), nothing);
        Floats highest = Vec::broadcast(nothing);
        for (int64_t i = 0; i < seen; i += kLanes) highest = Vec::max(Vec::load(scores + i), highest);
        // As the reference, which masks what a row does not see with -1e30: scores that are all -inf weigh nothing
        // then.
        const float maximum = std::max(Vec::highest(highest), whole ? nothing : kMasked);
        const Floats maximums = Vec::broadcast(maximum);
        Floats sums = Vec::zero();
        for (int64_t i = 0; i < seen; i += kLanes) {
            const Floats weights = exp(Vec::sub(Vec::load(scores + i), maximums));
            Vec::store(scores + i, weights);
            sums = Vec::add(sums, weights);
        }
        return {maximum, Vec::sum(sums)};
    }

    // accumulator += weights . values, slot by slot.
    void add_values(const float* weights, const float* values, int64_t count, float* accumulator) const {
        int64_t d = 0;
        for (; d + kRegistersOfValues * kLanes <= width_; d += kRegistersOfValues * kLanes) {
            add_columns<kRegistersOfValues>(weights, values + d, count, accumulator + d);
        }
        for (; d + 4 * kLanes <= width_; d += 4 * kLanes) add_columns<4>(weights, values + d, count, accumulator + d);
        for (; d < width_; d += kLanes) add_columns<1>(weights, values + d, count, accumulator + d);
    }

    template <int N>
    void add_columns(const float* weights, const float* values, int64_t count, float* accumulator) const {
        Floats sums[N];
        for (int i = 0; i < N; ++i) sums[i] = Vec::load(accumulator + i * kLanes);
        for (int64_t slot = 0; slot < count; ++slot) {
            const Floats weight = Vec::broadcast(weights[slot]);
            for (int i = 0; i < N; ++i) {
                sums[i] = Vec::multiply_add(weight, Vec::load(values + slot * width_ + i * kLanes), sums[i]);
            }
        }
        for (int i = 0; i < N; ++i) Vec::store(accumulator + i * kLanes, sums[i]);
    }

    const AttentionCall& call_;
    int64_t group_, width_, tokens_a_block_, scores_stride_;
};

template <class T>
void attention(const AttentionCall& call) {
    Attention<T>(call).run();
}
