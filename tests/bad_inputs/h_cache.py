"""H: the KV cache and its limits."""
