#include "calls.h"

namespace llama_fast {

std::string Places::problem(int64_t num_pages, int64_t page_size) const {
    const auto at = [](const char* name, int64_t index, int64_t value) {
        return std::string(name) + "[" + std::to_string(index) + "] is " + std::to_string(value);
    };
    if (query_starts[0] != 0 || query_starts[num_seqs] != num_tokens) {
        return "query_starts must run from 0 to the number of tokens, " + std::to_string(num_tokens) +
               "; it runs from " + std::to_string(query_starts[0]) + " to " + std::to_string(query_starts[num_seqs]);
    }
    for (int64_t s = 0; s < num_seqs; ++s) {
        const int64_t start = query_starts[s], end = query_starts[s + 1];
        if (end < start || end > num_tokens) return "query_starts must not fall; " + at("it", s + 1, end);
        for (int64_t token = start; token < end; ++token) {
            if (seq_ids[token] != s)
                return at("seq_ids", token, seq_ids[token]) + ", query_starts says " + std::to_string(s);
            if (slots[token] < 0 || slots[token] >= seq_lens[s]) {
                return at("slots", token, slots[token]) +
                       "; its sequence has slots 0 to seq_lens - 1 = " + std::to_string(seq_lens[s] - 1);
            }
            if (token > start && slots[token] <= slots[token - 1]) {
                return at("slots", token, slots[token]) + "; slots of a sequence must rise";
            }
        }
        if (end == start) continue;
        const int64_t used = slots[end - 1] / page_size + 1;
        if (used > max_pages)
            return at("slots", end - 1, slots[end - 1]) + "; page_table has " + std::to_string(max_pages) + " pages";
        for (int64_t page = 0; page < used; ++page) {
            const int64_t value = page_table[s * max_pages + page];
            if (value < 0 || value >= num_pages) {
                return at("page_table", s * max_pages + page, value) + "; the cache has pages 0 to " +
                       std::to_string(num_pages - 1);
            }
        }
    }
    return "";
}

}  // namespace llama_fast
