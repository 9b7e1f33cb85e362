"""Triton kernels, one file each; installed as `llama_fast.kernels`."""
