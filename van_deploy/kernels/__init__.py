"""Fused Triton kernels for VAN on NVIDIA GPUs, each with its plain PyTorch counterpart.

Every tensor is NHWC and contiguous, float16, bfloat16 or float32; sums are float32.
The kernels are imported only where Triton is installed.
"""
