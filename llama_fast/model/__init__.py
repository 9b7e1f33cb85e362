"""The packed Llama graph and its state: weights, rotary embedding, KV cache."""
