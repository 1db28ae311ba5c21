"""Imports what ranks and commands import, late too. Loaded by the server that they are forked from."""

import gc

from compt_megatron.torchvision_mend import ensure_torchvision

ensure_torchvision()

import deepspeed.comm.mori  # noqa: E402
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.ops.op_builder.all_ops  # noqa: E402
import deepspeed.ops.triton_ops  # noqa: E402, F401
import open_clip  # noqa: E402, F401
import PIL.Image  # noqa: E402
import pytest  # noqa: E402, F401
import torch.utils.serialization.config  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
import webdataset  # noqa: E402, F401
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402, F401

import compt_megatron.chain.runner  # noqa: E402
import compt_megatron.cli  # noqa: E402
import compt_megatron.engine.deepspeed  # noqa: E402
import compt_megatron.engine.megatron  # noqa: E402
import compt_megatron.evaluate.parity_clip  # noqa: E402
import compt_megatron.evaluate.parity_lm  # noqa: E402, F401

PIL.Image.init()
# A million objects that no child frees: its collector need not visit them, which would also copy their pages.
gc.collect()
gc.freeze()
