"""Fused CUDA kernels for losses that compare a student with its teacher, and images with texts.

Usable without compt_megatron. Without a GPU the same functions run their reference in plain PyTorch.
"""
