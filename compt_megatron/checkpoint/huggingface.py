"""Hugging Face's folders of language models: `config.json` and weights in safetensors, whole or in shards.

They hold weights only. What we write is loaded by transformers as it is. Older folders with `pytorch_model.bin` and
single safetensors files are read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint import open_clip
from compt_megatron.checkpoint.contract import (
    Format,
    TensorInfo,
    checked_region,
    region_shape,
    slabs,
    split_name,
)
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.huggingface_files import CONFIG, Shards, has_weights, refuse_shard, weight_files
from compt_megatron.checkpoint.huggingface_writer import HuggingFaceWriter
from compt_megatron.checkpoint.manifest import read_manifest, recorded_spec, under_name
from compt_megatron.checkpoint.state_file import holds_language_model, is_state_file
from compt_megatron.errors import Defects, UserError
from compt_megatron.recipe.files import read_json
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.huggingface_names import (
    ARCHITECTURES,
    HEAD,
    embedding_key,
    hf_place,
    hf_shapes,
    misfit_field,
    stored_keys,
)
from compt_megatron.spec.table import ModelSpec

# files beside the weights that a model is of no use without; a copy and a grown model get them too
ATTACHMENTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_COMPARED = 32 * 2**20  # bytes of a tied head and its embedding that are compared at a time


class HuggingFaceReader:
    """A language model in a folder, or in one file. The model is that of config.json, recorded, or given as `spec`."""

    def __init__(self, path: Path, spec: ModelSpec | None = None, trust_pickle: bool = False) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        self._folder = path if path.is_dir() else path.parent
        if path.is_dir():
            guard = Guard(path, self._manifest)
            names, index = weight_files(path)
        else:
            guard = Guard(path.parent, under_name(self._manifest, path.name))
            names, index = [path.name], None
            refuse_shard(path)
        self._spec = self._find_spec(spec)
        self.spec: ModelSpec | None = self._spec
        self._places = {f"weight/{name}": hf_place(self._spec, name) for name in self._spec.params}
        self._state = Shards(guard, names, index, trust_pickle)
        try:
            self._keys = self._matched()
        except BaseException:
            self.close()
            raise
        self._tied_unchecked = HEAD in self._keys and self._spec.towers["text"].tied

    def _find_spec(self, given: ModelSpec | None) -> ModelSpec:
        found = recorded_spec(self._manifest, given, self.path)
        config = self._folder / CONFIG
        if self._manifest is None and config.is_file() and (given is None or self.path.is_dir()):
            found = spec_from_config(read_json(config), self._folder.resolve().name)
            if given is not None and given.digest != found.digest:
                raise UserError(f"{self.path}: checkpoint of another model than '{given.name}': see its {CONFIG}")
        if found is None:
            raise UserError(f"{self.path}: has no {CONFIG}; restore it, or name the model's config with --from")
        if not found.is_language_model:
            raise UserError(f"{self.path}: holds a language model, and '{found.name}' is none; name its model config")
        return found

    def _matched(self) -> dict[str, str]:
        """Key of transformers' model -> key in the files, all of them there in their shapes."""
        stored = self._state.tensors()
        keys, strangers = stored_keys(self._spec, stored)
        wrong = [(f"also has '{key}'", misfit_field(self._spec, key)) for key in strangers]
        expected = hf_shapes(self._spec)
        embedding = embedding_key(self._spec)
        if self._spec.towers["text"].tied and HEAD in keys:
            if embedding not in keys:  # the same tensor under its other name
                keys[embedding] = keys.pop(HEAD)
            else:
                expected[HEAD] = expected[embedding]
        fewer = self._has_fewer_layers(keys)
        for key, shape in expected.items():
            if key not in keys:
                wrong.append((f"has no '{key}'", self._missing_field(key, fewer)))
            elif (found := stored[keys[key]].shape) != shape:
                field = misfit_field(self._spec, embedding if key == HEAD else key, found)
                wrong.append((f"has '{key}' in shape {list(found)} where {list(shape)} is needed", field))
        if wrong:
            raise Defects([self._misfit(*each) for each in wrong])
        return keys

    def _has_fewer_layers(self, keys: dict[str, str]) -> bool:
        prefix, layers = self._spec.towers["text"].block_prefix, self._spec.towers["text"].layers
        inside = (key.removeprefix(f"{prefix}.") for key in keys if key.startswith(f"{prefix}."))
        return len({key.partition(".")[0] for key in inside}) < layers

    def _missing_field(self, key: str, fewer_layers: bool) -> str:
        """The number of layers if a whole layer is missing, else what the key itself says."""
        tower = self._spec.towers["text"]
        of_a_block = key.startswith(f"{tower.block_prefix}.")
        return misfit_field(self._spec, f"{tower.block_prefix}.{tower.layers}." if of_a_block and fewer_layers else key)

    def _misfit(self, what: str, field: str) -> str:
        see = f" (see '{field}')" if field else ""
        return (
            f"{self.path}: checkpoint of another model than its config's{see}: it {what}; "
            "use the config that belongs to it, or restore the weights"
        )

    def tensors(self) -> dict[str, TensorInfo]:
        stored = self._state.tensors()
        return {
            name: TensorInfo(self._spec.params[split_name(name)[1]].shape, stored[self._keys[place.key]].dtype)
            for name, place in self._places.items()
        }

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> torch.Tensor:
        place = self._places[name]
        box = checked_region(name, self._spec.params[split_name(name)[1]].shape, region)
        key = self._keys[place.key]
        if not all(region_shape(box)):
            return torch.empty(region_shape(box), dtype=self._state.tensors()[key].dtype)
        if self._tied_unchecked and place.key == embedding_key(self._spec):
            self._check_tied()
        last = box[-1]
        return self._state.read(key, (*box[:-1], slice(last.start + place.start, last.stop + place.start)))

    def _check_tied(self) -> None:
        """Where a head lies beside the embedding that it is tied to they must be equal: transformers 4 ignores the
        head, 5 does not, and a grown model would be that of one of the two."""
        embedding, head = self._keys[embedding_key(self._spec)], self._keys[HEAD]
        for region in slabs(self._state.tensors()[embedding], _COMPARED):
            if not torch.equal(self._state.read(embedding, region), self._state.read(head, region)):
                raise UserError(
                    f"{self.path}: '{head}' differs from '{embedding}', although its config ties them; set "
                    f"'tie_word_embeddings' to false in {CONFIG} to keep both"
                )
        self._tied_unchecked = False

    def metadata(self) -> dict[str, Any]:
        """compt.json where there is one; `attachments`: the tokenizer's files, {name: path}."""
        own = self.path.is_dir() or (self._folder / CONFIG).is_file()
        names = [name for name in ATTACHMENTS if own and (self._folder / name).is_file()]
        beside = {name: str(self._folder / name) for name in names}
        return ({"attachments": beside} if beside else {}) | (self._manifest or {})

    def close(self) -> None:
        self._state.close()


def _recognises(path: Path) -> bool:
    if not path.is_dir():
        return is_state_file(path) and holds_language_model(path)
    # open_clip's folders on the hub often have a config.json of transformers' CLIP beside, and its weights
    return has_weights(path) and (_model_type(path) in ARCHITECTURES or not open_clip.FORMAT.recognises(path))


def _model_type(folder: Path) -> Any:
    try:
        found = read_json(folder / CONFIG).get("model_type")
    except UserError:  # missing or damaged: said when it is opened
        return None
    return found if isinstance(found, str) else None


FORMAT = Format("hf", _recognises, HuggingFaceReader, HuggingFaceWriter, prefixes=("weight",), attachments=True)
