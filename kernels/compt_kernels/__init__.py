"""Fused CUDA kernels for losses that compare a student with its teacher, and images with texts.

Usable without compt_megatron. Without a GPU the same functions run their reference in plain PyTorch.
"""

from compt_kernels.align import align_loss, align_loss_parallel
from compt_kernels.contrastive import contrastive_loss, siglip_loss
from compt_kernels.distill import distill_kl

__all__ = ["align_loss", "align_loss_parallel", "contrastive_loss", "siglip_loss", "distill_kl"]
