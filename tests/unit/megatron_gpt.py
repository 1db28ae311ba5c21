"""megatron-core's own GPT models of a spec, on the CPU: filled, run and saved by megatron-core alone."""

from __future__ import annotations

import argparse
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from compt_megatron.checkpoint.megatron_args import model_args
from compt_megatron.models import megatron_cpu
from compt_megatron.spec.table import ModelSpec

OPTIONS = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}  # of Megatron-LM 0.16


@contextmanager
def cpu() -> Iterator[None]:
    """While open, what megatron-core's saving and its optimizers ask of torch.cuda happens on the CPU."""
    if torch.cuda.is_available():
        yield
        return
    tensor_type = torch.Tensor.type

    def spelled(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = tensor_type(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    def on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return make(*args, **kwargs)

        return made

    with (
        mock.patch.multiple(torch.cuda, synchronize=lambda *_: None, current_device=lambda: torch.device("cpu")),
        mock.patch.multiple(torch.Tensor, type=spelled, cuda=lambda self, *_, **__: self),
        mock.patch.multiple(torch, **{name: on_cpu(getattr(torch, name)) for name in ("tensor", "zeros", "empty")}),
    ):
        yield


def ready(tensor: int = 1, pipeline: int = 1, virtual: int | None = None) -> Any:
    """Import megatron-core and make its groups; returns its parallel state."""
    megatron_cpu.install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from compt_megatron.models.groups import ensure_groups

    filesystem_async._results_queue = queue.Queue()  # it would start a process, which costs seconds, to have one
    if virtual is None:
        ensure_groups(tensor, pipeline)
        return parallel_state
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline, virtual)
    with megatron_cpu.cuda_seeding_on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return parallel_state


def build(spec: ModelSpec, vocab: int | None = None, stage: int | None = None, **more: Any) -> Any:
    """This rank's GPTModel of a spec, made of the arguments that Megatron-LM would make it of; `vocab`: padded to;
    `stage`: of a virtual pipeline."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    args = argparse.Namespace(**model_args(spec))
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else _tanh_gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **more,
    )
    torch.manual_seed(7)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
    with cpu():
        return GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(
                qk_layernorm=args.qk_layernorm, normalization=args.normalization
            ),
            vocab_size=vocab or spec.params[next(iter(spec.params))].shape[0],
            max_sequence_length=args.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_base=args.rotary_base,
            rope_scaling=getattr(args, "use_rope_scaling", False),
            parallel_output=False,
            vp_stage=stage,
        ).eval()


def _tanh_gelu(value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(value, approximate="tanh")


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, length, vocabulary] of a model that is one pipeline stage."""
    length = tokens.shape[1]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    with torch.no_grad(), cpu():
        return model(tokens, torch.arange(length).expand_as(tokens), mask)


def sharded(model: Any, **options: Any) -> dict[str, Any]:
    return model.sharded_state_dict(metadata={**OPTIONS, **options})


def load(model: Any, folder: Path) -> dict[str, Any]:
    """Let megatron-core load the model of a torch_dist folder; returns the common state."""
    from megatron.core import dist_checkpointing

    with cpu():
        found = dist_checkpointing.load({"model": sharded(model)}, str(folder))
    model.load_state_dict(found.pop("model"))
    return found


def save(folder: Path, state: dict[str, Any], **options: Any) -> Path:
    """Let megatron-core save a state dict of sharded parts."""
    from megatron.core import dist_checkpointing

    folder.mkdir(parents=True, exist_ok=True)
    with cpu():
        dist_checkpointing.save(state, str(folder), content_metadata={**OPTIONS, **options})
    return folder


def train_step(model: Any, kind: str | None) -> tuple[Any, dict[str, Any]]:
    """One step of Megatron's Adam on gradients that are a function of the parameters, so the same at any layout.

    `kind`: how the distributed optimizer saves, None for the other optimizer.

    Returns the optimizer and the state to save.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    distributed = {"use_distributed_optimizer": kind is not None}
    with cpu():
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(**distributed), model)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, **distributed), [wrapped])
        for parameter in model.parameters():
            parameter.main_grad.copy_((7 * parameter.detach()).sin())
        optimizer.step()
        state = {"model": sharded(model), "iteration": 5}
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        options = {**OPTIONS, "dp_cp_group": group} | ({"distrib_optim_sharding_type": kind} if kind else {})
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=options)
    return optimizer, state


def moments(model: Any, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Name in the module -> the moments (and the fp32 copy, with the distributed optimizer) of a whole parameter."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for name, parameter in model.named_parameters():
            if hasattr(part, "_get_main_param_and_optimizer_states"):
                states = part._get_main_param_and_optimizer_states(parameter)
                states["master"] = states.pop("param")
            else:
                states = part.optimizer.state[parameter]
            kept = ("master", "exp_avg", "exp_avg_sq")
            found[name] = {key: states[key].view(parameter.shape) for key in kept if key in states}
    return found
