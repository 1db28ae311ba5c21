"""Hugging Face's folders of language models: `config.json` and weights in safetensors, whole or in shards.

They hold weights only. What we write is loaded by transformers as it is. Older folders with `pytorch_model.bin` and
single safetensors files are read too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compt_megatron.checkpoint import open_clip
from compt_megatron.checkpoint.commit import HashedFile, file_hash
from compt_megatron.checkpoint.contract import (
    Format,
    Task,
    TensorInfo,
    checked_region,
    dtype_name,
    region_shape,
    slabs,
    split_name,
)
from compt_megatron.checkpoint.flat_file import FlatFile
from compt_megatron.checkpoint.guard import Guard
from compt_megatron.checkpoint.huggingface_files import (
    INDEX,
    WEIGHTS,
    Shards,
    has_weights,
    refuse_shard,
    shard_name,
    weight_files,
)
from compt_megatron.checkpoint.manifest import read_manifest, recorded_spec, under_name
from compt_megatron.checkpoint.state_file import holds_language_model, is_state_file
from compt_megatron.checkpoint.writing import BoxWriter, FileRow, one_dtype
from compt_megatron.errors import UserError
from compt_megatron.recipe.files import read_json
from compt_megatron.spec.families import spec_from_config
from compt_megatron.spec.huggingface_names import (
    ARCHITECTURES,
    HEAD,
    HfPlace,
    embedding_key,
    explicit_config,
    hf_place,
    hf_shapes,
    misfit_field,
    stored_keys,
)
from compt_megatron.spec.table import ModelSpec

CONFIG = "config.json"
SHARD_BYTES = 5 * 10**9  # of one file, as transformers cuts them
# files beside the weights that a model is of no use without; a copy and a grown model get them too
ATTACHMENTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
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
        self._state = Shards(guard, names, index)
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
        if strangers:
            self._refuse(f"also has '{strangers[0]}'", misfit_field(self._spec, strangers[0]))
        expected = hf_shapes(self._spec)
        embedding = embedding_key(self._spec)
        if self._spec.towers["text"].tied and HEAD in keys:
            if embedding not in keys:  # the same tensor under its other name
                keys[embedding] = keys.pop(HEAD)
            else:
                expected[HEAD] = expected[embedding]
        for key, shape in expected.items():
            if key not in keys:
                self._refuse(f"has no '{key}'", self._missing_field(key, keys))
            if (found := stored[keys[key]].shape) != shape:
                field = misfit_field(self._spec, embedding if key == HEAD else key, found)
                self._refuse(f"has '{key}' in shape {list(found)} where {list(shape)} is needed", field)
        return keys

    def _missing_field(self, key: str, keys: dict[str, str]) -> str:
        """The number of layers if a whole layer is missing, else what the key itself says."""
        prefix, layers = self._spec.towers["text"].block_prefix, self._spec.towers["text"].layers
        there = {index for index in range(layers) if any(found.startswith(f"{prefix}.{index}.") for found in keys)}
        if key.startswith(f"{prefix}.") and len(there) < layers:
            return misfit_field(self._spec, f"{prefix}.{layers}.")
        return misfit_field(self._spec, key)

    def _refuse(self, what: str, field: str) -> None:
        see = f" (see '{field}')" if field else ""
        raise UserError(
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


class HuggingFaceWriter(BoxWriter):
    """Writes a folder with `config.json` and weights, in shards of at most SHARD_BYTES, or one safetensors file.

    Weights go straight to their place in the files. `attachments` of the metadata are copied into the folder.
    """

    format_name = "hf"

    def __init__(self, task: Task) -> None:
        if not task.spec.is_language_model:
            raise UserError(f"{task.path}: hf holds language models, '{task.spec.name}' is none; choose another format")
        if task.path.suffix == ".pt":
            raise UserError(f"{task.path}: hf is written as a folder or as one .safetensors file; rename it")
        self._places: dict[str, HfPlace] = {name: hf_place(task.spec, name) for name in task.spec.params}
        self._files: dict[str, FlatFile] = {}
        self._home: dict[str, FlatFile] = {}
        super().__init__(task)

    def _accept(self, tensors: dict[str, TensorInfo]) -> None:
        for name in tensors:
            prefix, rest = split_name(name)
            if prefix != "weight" or rest not in self._places:
                raise UserError(f"{self.destination.path}: hf holds weights only, '{name}' has no place there")
        if self._files:
            assert not tensors, "a Hugging Face checkpoint is declared at once"
            return
        missing = [name for name in self._places if f"weight/{name}" not in self.declared]
        assert not missing, f"{missing[0]} and {len(missing) - 1} others are not declared"
        members: dict[str, list[str]] = {}
        for name, place in self._places.items():
            members.setdefault(place.key, []).append(f"weight/{name}")
        stored = {
            key: TensorInfo(shape, one_dtype(key, members[key], self.declared))
            for key, shape in hf_shapes(self.spec).items()
        }
        for name, part in self._cut(stored):
            file = self._files[name] = FlatFile(self.folder / name, part)
            self._home |= dict.fromkeys(part, file)
        self.party.lead(self._create)
        for file in self._files.values():
            file.open()

    def _create(self) -> None:
        for file in self._files.values():
            file.create()

    def _cut(self, stored: dict[str, TensorInfo]) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
        """File names and the tensors in them, in the order of the model."""
        if self.destination.single:
            yield self.destination.path.name, stored
            return
        shards: list[dict[str, TensorInfo]] = [{}]
        size = 0
        for key, info in stored.items():
            if shards[-1] and size + info.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][key] = info
            size += info.nbytes
        for index, shard in enumerate(shards):
            yield shard_name(index, len(shards)) if len(shards) > 1 else WEIGHTS, shard

    def _put(self, name: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        place = self._places[split_name(name)[1]]
        self._home[place.key].write(place.key, (*offsets[:-1], offsets[-1] + place.start), tensor)

    def _finish_rank(self) -> tuple[list[FileRow], Any]:
        assert self._files, "commit without declare"
        for file in self._files.values():
            file.finish()
        return [], None

    def _finish_folder(self, parts: list[Any], metadata: dict[str, Any]) -> list[FileRow]:
        rows = [(name, file_hash(file.path), file.path.stat().st_size) for name, file in self._files.items()]
        if self.destination.single:
            return rows
        if len(self._files) > 1:
            total = sum(info.nbytes for file in self._files.values() for info in file.tensors.values())
            home = {key: file.path.name for key, file in self._home.items()}
            rows.append(self._json(INDEX, {"metadata": {"total_size": total}, "weight_map": home}))
        rows.append(self._json(CONFIG, explicit_config(self.spec, self._main_dtype())))
        for name, source in (metadata.get("attachments") or {}).items():
            attached = HashedFile(self.folder / name)
            attached.write(Path(source).read_bytes())
            rows.append(attached.finish())
        return rows

    def _main_dtype(self) -> str:
        """The dtype of most elements."""
        counts: Counter[torch.dtype] = Counter()
        for info in self.declared.values():
            counts[info.dtype] += info.nbytes // info.dtype.itemsize
        return dtype_name(max(counts, key=lambda dtype: counts[dtype]))

    def _json(self, name: str, content: dict[str, Any]) -> FileRow:
        file = HashedFile(self.folder / name)
        file.write((json.dumps(content, indent=2) + "\n").encode())
        return file.finish()

    def _release(self) -> None:
        for file in self._files.values():
            file.close()


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
