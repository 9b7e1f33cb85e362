// advance: each row of a decoding batch gets the token drawn for it, or ends. As ops/shared.py; a few numbers a row.
#pragma once

#include <cstdint>

namespace llama_fast {

// The fields of engine/decode_rows.py, one number a row where nothing else is said.
struct DecodeRows {
    int64_t *token_ids, *slots, *seq_lens, *limits, *done;
    int64_t* page_table;     // rows of max_pages
    const bool* stop_mask;   // rows of vocab_size
    int32_t* output_counts;  // rows of vocab_size
    int64_t max_pages, vocab_size, spare_page;
};

constexpr int64_t kAtRest = -2;  // ops/shared.py's

// tokens, out [count]; rows: which rows they are for, or null for the first ones. counted: output_counts takes them.
inline void advance(const DecodeRows& state, const int64_t* tokens, const int64_t* rows, int64_t count, bool counted,
                    int64_t* out) {
    for (int64_t place = 0; place < count; ++place) {
        const int64_t row = rows == nullptr ? place : rows[place], token = tokens[place];
        if (state.done[row] != 0) {
            out[place] = kAtRest;
            continue;
        }
        out[place] = token;
        const int64_t length = state.seq_lens[row], cell = row * state.vocab_size + token;
        if (counted && token >= 0) ++state.output_counts[cell];
        const bool ends = token < 0 || state.stop_mask[cell] || length + 1 >= state.limits[row];
        state.token_ids[row] = ends ? 0 : token;
        state.slots[row] = ends ? 0 : length;
        state.seq_lens[row] = ends ? 1 : length + 1;
        state.done[row] = ends;
        if (ends) state.page_table[row * state.max_pages] = state.spare_page;
    }
}

}  // namespace llama_fast
