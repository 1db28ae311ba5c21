"""Imports what `compt train` imports late. Loaded by the server that commands are forked from."""

from compt_megatron.torchvision_mend import ensure_torchvision

ensure_torchvision()

import open_clip  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import compt_megatron.models  # noqa: E402, F401
