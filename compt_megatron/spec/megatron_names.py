"""How megatron-core modules, and the torch_dist files they are saved to, name and fuse the parameters of the table.

A CLIP tower is a `TransformerBlock` called `decoder` under `vision.` or `text.`; a language model is a `GPTModel`. In
files all layers of a parameter are one tensor with a leading layer axis, and its key is the Transformer Engine spelling
(the norm belongs to the linear that follows it), as Megatron writes it. Several parameters may share a tensor: the
rows of the fused QKV are interleaved per query group, [groups, heads per group + 2, head_dim]; SwiGLU is [gate; up].
Megatron keeps matrices [out, in]: GPT-2's [in, out] are transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from compt_megatron.spec.table import ModelSpec, Param

Part = Literal["q", "k", "v", "gate", "up"]

WORD_EMBEDDINGS, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
PADDED_KEYS = (WORD_EMBEDDINGS, OUTPUT_LAYER)  # Megatron pads their rows, the vocabulary, for tensor parallelism

_Names = dict[str, tuple[str, str, Part | None]]  # canonical suffix -> (module suffix, file suffix, part)


def _norm(name: str, module: str, linear: str) -> _Names:
    """A norm: a module of its own, in files a part of the linear after it."""
    return {f"{name}.{leaf}": (f"{module}.{leaf}", f"{linear}.layer_norm_{leaf}", None) for leaf in ("weight", "bias")}


def _linear(names: dict[Part | None, str], module: str) -> _Names:
    """A linear that holds one parameter, or several parts."""
    leaves = ("weight", "bias")
    return {
        f"{name}.{leaf}": (f"{module}.{leaf}", f"{module}.{leaf}", part)
        for part, name in names.items()
        for leaf in leaves
    }


def _block(prefix: str, out: str, norms: tuple[str, str]) -> _Names:
    """What all families have: attention under `prefix` with output projection `out`, and two norms."""
    return {
        **_norm(norms[0], "input_layernorm", "self_attention.linear_qkv"),
        **_linear(
            {"q": f"{prefix}.q_proj", "k": f"{prefix}.k_proj", "v": f"{prefix}.v_proj"}, "self_attention.linear_qkv"
        ),
        **_linear({None: f"{prefix}.{out}"}, "self_attention.linear_proj"),
        **_norm(norms[1], "pre_mlp_layernorm", "mlp.linear_fc1"),
    }


_PLAIN_MLP: _Names = {
    **_linear({None: "mlp.c_fc"}, "mlp.linear_fc1"),
    **_linear({None: "mlp.c_proj"}, "mlp.linear_fc2"),
}
_GATED_MLP: _Names = {
    **_linear({"gate": "mlp.gate_proj", "up": "mlp.up_proj"}, "mlp.linear_fc1"),
    **_linear({None: "mlp.down_proj"}, "mlp.linear_fc2"),
}
_CLIP: _Names = {
    **_block("attn", "out_proj", ("ln_1", "ln_2")),
    **_PLAIN_MLP,
    "ls_1.gamma": (*("self_attention.linear_proj.gamma",) * 2, None),
    "ls_2.gamma": (*("mlp.linear_fc2.gamma",) * 2, None),
}
_GPT2: _Names = {**_block("attn", "c_proj", ("ln_1", "ln_2")), **_PLAIN_MLP}
_LLAMA: _Names = {
    **_block("self_attn", "o_proj", ("input_layernorm", "post_attention_layernorm")),
    **{f"self_attn.{short}_norm.weight": (f"self_attention.{short}_layernorm.weight",) * 2 + (None,) for short in "qk"},
    **_GATED_MLP,
}
_LAYER_NAMES: dict[str, _Names] = {"clip": _CLIP, "vit": _CLIP, "gpt2": _GPT2, "llama": _LLAMA}

_OUTER_NAMES = {
    "visual.class_embedding": "vision.class_embedding",
    "visual.positional_embedding": "vision.position_embedding",
    "visual.conv1.weight": "vision.conv1.weight",
    "visual.ln_pre.weight": "vision.ln_pre.weight",
    "visual.ln_pre.bias": "vision.ln_pre.bias",
    "visual.ln_post.weight": "vision.ln_post.weight",
    "visual.ln_post.bias": "vision.ln_post.bias",
    "visual.proj": "vision.projection",
    "positional_embedding": "text.position_embedding",
    "token_embedding.weight": "text.token_embedding.weight",
    "ln_final.weight": "text.ln_final.weight",
    "ln_final.bias": "text.ln_final.bias",
    "text_projection": "text.projection",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "transformer.wte.weight": WORD_EMBEDDINGS,
    "transformer.wpe.weight": "embedding.position_embeddings.weight",
    "transformer.ln_f.weight": "decoder.final_layernorm.weight",
    "transformer.ln_f.bias": "decoder.final_layernorm.bias",
    "model.embed_tokens.weight": WORD_EMBEDDINGS,
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": OUTPUT_LAYER,
}


class Run(NamedTuple):
    """Rows [start, stop) of a parameter are rows [at, at + stop - start) of the tensor that holds it."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Rows:
    """Where a parameter's rows lie in the tensor that holds it: row i at (i // unit) * stride + first + i % unit."""

    unit: int
    stride: int
    first: int

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """The rows [start, stop) of the parameter as contiguous runs."""
        if start >= stop:
            return
        if self.unit == self.stride:
            yield Run(start, stop, self.first + start)
            return
        for index in range(start // self.unit, -(-stop // self.unit)):
            first, last = max(start, index * self.unit), min(stop, (index + 1) * self.unit)
            yield Run(first, last, index * self.stride + self.first + first - index * self.unit)


@dataclass(frozen=True)
class MegatronPlace:
    """Where a parameter of the table lives in megatron-core modules and in torch_dist files.

    `module`: the parameter's name in the unsharded module; `key`: its key in a file; `layer`: its index on the file
    tensor's leading layer axis (None: no such axis); `part`: which part of a shared tensor it is (None: all of it);
    `rows`: where its rows (those of its transpose if `transposed`) lie in that tensor; `shape`: the tensor's shape in
    the module; `split`: the tensor's dimension that tensor parallelism splits.
    """

    module: str
    key: str
    layer: int | None
    part: Part | None
    rows: Rows
    transposed: bool
    shape: tuple[int, ...]
    split: int | None


def megatron_place(spec: ModelSpec, name: str) -> MegatronPlace:
    """The place of canonical parameter `name`."""
    return place_on_rank(spec, name, 1)


def place_on_rank(spec: ModelSpec, name: str, tensor: int) -> MegatronPlace:
    """The place of a rank's part of parameter `name` in that rank's module, where `tensor` ranks split the model.

    A rank has as many query groups, MLP units (of gate and of up) or vocabulary entries as every other; `shape` and
    `rows` are those of its own tensor. The vocabulary counts as padded to a multiple of `tensor`.
    """
    param = spec.params[name]
    tower = spec.towers.get(param.tower)
    transposed = spec.family == "gpt2" and param.stage == "layer" and len(param.dims) == 2
    split = None if param.tensor_dim is None else 1 - param.tensor_dim if transposed else param.tensor_dim
    if param.stage != "layer":
        shape = _rank_shape(param, False, tensor)
        return MegatronPlace(_OUTER_NAMES[name], _OUTER_NAMES[name], None, None, _alone(shape), False, shape, split)
    assert tower is not None
    block = f"{tower.block_prefix}.{param.layer}."
    module, key, part = _LAYER_NAMES[spec.family][name.removeprefix(block)]
    prefix = "decoder.layers" if spec.is_language_model else f"{param.tower}.decoder.layers"
    shape = _rank_shape(param, transposed, tensor)
    rows = _alone(shape)
    if part in ("gate", "up"):
        rows = Rows(shape[0], shape[0], 0 if part == "gate" else shape[0])
        shape = (2 * shape[0], *shape[1:])
    elif part is not None:
        leaf = name.removeprefix(block).rpartition(".")[2]
        head = f"{block}{name.removeprefix(block).split('.')[0]}"  # the attention's own prefix
        sizes = [
            _rank_shape(spec.params[f"{head}.{other}_proj.{leaf}"], transposed, tensor)[0] for other in ("q", "k", "v")
        ]
        rows = _interleaved(part, sizes[0], sizes[1], tower.head_dim)
        shape = (sum(sizes), *shape[1:])
    return MegatronPlace(
        f"{prefix}.{param.layer}.{module}", f"{prefix}.{key}", param.layer, part, rows, transposed, shape, split
    )


def _rank_shape(param: Param, transposed: bool, tensor: int) -> tuple[int, ...]:
    sizes = list(param.shape)
    if param.tensor_dim is not None:
        sizes[param.tensor_dim] = -(-sizes[param.tensor_dim] // tensor)
    return tuple(reversed(sizes)) if transposed else tuple(sizes)


def _alone(shape: tuple[int, ...]) -> Rows:
    size = shape[0] if shape else 1
    return Rows(size, size, 0)


def _interleaved(part: Part, queries: int, keys: int, head_dim: int) -> Rows:
    """Rows of q, k or v in the fused tensor; `queries` and `keys` are the rows of q and of k."""
    groups = keys // head_dim
    own = queries // groups
    stride = own + 2 * head_dim
    if part == "q":
        return Rows(own, stride, 0)
    return Rows(head_dim, stride, own if part == "k" else own + head_dim)
