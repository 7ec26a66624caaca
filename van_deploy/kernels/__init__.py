"""Fused Triton kernels for VAN on NVIDIA GPUs, each with its plain PyTorch counterpart.

Every tensor is NHWC and contiguous, in float16, bfloat16 or float32; sums are float32.
The kernel modules need Triton.
"""
