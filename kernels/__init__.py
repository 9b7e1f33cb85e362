"""Triton kernels, one file each: what is fused, what it costs, how it is launched. Inference only.

A kernel has the signature of its plain-PyTorch twin in ops/reference.py. It runs on CUDA tensors, or on CPU tensors in
Triton's interpreter where TRITON_INTERPRET=1 was set before this package was imported.
"""
