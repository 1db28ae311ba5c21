"""Language models: token embeddings, megatron-core transformer layers, final norm, and a head that makes no logits by
itself.

Modules are named as in megatron-core's GPTModel. A module may be a stage of a pipeline, without embeddings or without
the head; dropout is 0 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from compt_megatron.models.block import LayerNorm, RMSNorm
from compt_megatron.models.rotary import Rotary
from compt_megatron.models.towers import TowerBase, TowerPlace
from compt_megatron.spec.table import Tower
from compt_megatron.vocabulary import Head

Outputs = dict[str, Any]


def layer_key(layer: int) -> str:
    """The output that holds the residual stream behind a layer, counted from 0 in the whole model."""
    return f"layer_{layer}"


class Positions(nn.Module):
    """Learned positions."""

    def __init__(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, width, dtype=dtype))

    def forward(self, tokens: int) -> Tensor:
        """[tokens, 1, width] of the first `tokens` positions."""
        assert tokens <= len(self.weight), f"{tokens} tokens, but the model has {len(self.weight)} positions"
        return self.weight[:tokens].unsqueeze(1)


class Embedding(nn.Module):
    """Token embeddings, their vocabulary split over the tensor-parallel ranks, and learned positions if there are."""

    def __init__(self, tower: Tower, config: TransformerConfig, group: dist.ProcessGroup, padded: int) -> None:
        """`padded`: the vocabulary, padded to a multiple of the ranks."""
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            padded, tower.width, init_method=config.init_method, config=config, tp_group=group
        )
        learned = tower.rope is None
        self.position_embeddings = Positions(tower.tokens, tower.width, config.params_dtype) if learned else None

    def forward(self, tokens: Tensor) -> Tensor:
        """token ids [b, n] -> [n, b, width]."""
        hidden: Tensor = self.word_embeddings(tokens.t())
        return hidden if self.position_embeddings is None else hidden + self.position_embeddings(tokens.shape[1])


class OutputLayer(nn.Module):
    """The head: this rank's vocabulary entries, for whoever makes logits or a loss of them.

    A module of its own that is called while its weight is used, so that ZeRO 3 has gathered it then.
    """

    def __init__(self, weight: nn.Parameter, vocab: int, group: dist.ProcessGroup) -> None:
        """weight: [padded vocabulary / ranks, width]; with a tied head on the same stage, the embedding's own."""
        super().__init__()
        self.weight = weight
        ranks, rank, each = dist.get_world_size(group), dist.get_rank(group), weight.shape[0]
        self.first, self.rows, self.vocab = rank * each, min(each, vocab - rank * each), vocab
        self.group = group if ranks > 1 else None

    def forward(self, use: Callable[[Head], Any]) -> Any:
        """What `use` makes of the head."""
        return use(Head(self.weight, self.rows, self.first, self.vocab, self.group))


class LanguageModel(TowerBase):
    """A decoder that predicts tokens: Llama-type (rotary positions, RMSNorm, gated MLP) or GPT-2-type.

    `rotary`: None with learned positions. `window`: how many tokens a token sees, itself included (None: all before
    it). `layers`: the numbers of this module's layers in the whole model.
    """

    def __init__(
        self,
        tower: Tower,
        config: TransformerConfig,
        place: TowerPlace,
        *,
        vocab: int,
        biased: Sequence[str],
        rotary: Rotary | None,
        window: int | None,
        layers: range,
    ) -> None:
        super().__init__(tower, config, place, biased)
        self.vocab, self.layers, self._rotary = vocab, layers, rotary
        for layer in self.decoder.layers:
            layer.self_attention.core_attention.window = window
        ranks = dist.get_world_size(self.tensor_group)
        padded = -(-vocab // ranks) * ranks
        if place.pre_process:
            self.embedding = Embedding(tower, config, self.tensor_group, padded)
        if place.post_process:
            norm = RMSNorm if tower.norm == "rms" else LayerNorm
            self.decoder.final_layernorm = norm(config, tower.width, eps=tower.norm_eps)
            shared = tower.tied and place.pre_process
            weight = self.embedding.word_embeddings.weight if shared else self._parameter(padded // ranks, tower.width)
            if tower.tied and not shared:
                weight.shared = True  # type: ignore[union-attr]  # megatron's mark: norms count the other copy
            self.output_layer = OutputLayer(weight, vocab, self.tensor_group)
        if tower.tied and place.pre_process != place.post_process:
            # the other copy is on another stage: megatron's buffers then give each a bucket of its own, cut alike
            for name, parameter in self.named_parameters():
                if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                    parameter.shared_embedding = True  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, layers: Sequence[int] = (), use: Callable[[Outputs], Any] | None = None) -> Any:
        """token ids [b, n] int64 -> this stage's outputs, in the model's dtype. All stages want the same tokens.

        On the last stage: `hidden` [b, n, width], after the final norm, and `head`, which makes logits of it
        (compt_megatron.vocabulary.Head). On others: `activations` for the next stage, [n, b, width], or this rank's
        tokens of it under sequence parallelism. On every stage, for each i of `layers` that it has: `layer_<i>`
        [b, n, width], the residual stream behind layer i, counted from 0 in the whole model (before the final norm).

        `hidden` and `layer_<i>` are whole and alike on all tensor-parallel ranks, and want gradients that are so too:
        where each rank has a part of what depends on them, sum their gradients over the ranks first.

        `use`: on the last stage called with the outputs, and its result is returned in their place. Under ZeRO 3 the
        head's weight is there only for that time.
        """
        rotation = None if self._rotary is None else self._rotary.angles(self.padded(tokens.shape[1]), tokens.device)
        hidden = self._spread(self.embedding(tokens)) if self.pre_process else self.decoder.input_tensor
        # megatron frees what it has sent, which must not be a view
        hidden = make_viewless_tensor(inp=hidden, requires_grad=torch.is_grad_enabled(), keep_graph=True)
        outputs: Outputs = {}
        for index, layer in zip(self.layers, self.decoder.layers, strict=True):
            hidden = self._run(layer, hidden, rotation)
            if index in layers:
                outputs[layer_key(index)] = self._output(hidden, tokens.shape[1])
        if not self.post_process:
            return {"activations": hidden, **outputs}
        outputs["hidden"] = self._output(self.decoder.final_layernorm(hidden), tokens.shape[1])
        call = use or (lambda given: given)
        return self.output_layer(lambda head: call({**outputs, "head": head}))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of `hidden` [..., width], whole on every tensor-parallel rank. Last stage only."""
        return self.output_layer(lambda head: full_logits(hidden, head))

    def _run(self, layer: nn.Module, hidden: Tensor, rotation: Tensor | None) -> Tensor:
        def run(hidden: Tensor, rotation: Tensor | None) -> Tensor:
            found: Tensor = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotation)[0]
            return found

        if self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled():
            again: Tensor = tensor_parallel.checkpoint(run, False, hidden, rotation)
            return again
        return run(hidden, rotation)

    def _output(self, hidden: Tensor, tokens: int) -> Tensor:
        return self._collect(hidden)[:tokens].transpose(0, 1)

    def _inside(self, tokens: int) -> int:
        return self.padded(tokens)


def full_logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits [..., vocabulary] of `hidden` [..., width], whole on every rank of the head's group."""
    if head.group is None:
        return hidden @ head.weight[: head.rows].t()
    hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=head.group)
    parts = hidden @ head.weight.t()
    return tensor_parallel.gather_from_tensor_model_parallel_region(parts, group=head.group)[..., : head.vocab]
