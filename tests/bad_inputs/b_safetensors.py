"""B: one safetensors file."""
