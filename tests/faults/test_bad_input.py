"""Every mistake of a user is exit status 2 and one line that names it, and nothing is left behind.

Through the command line, in this process: no case here gets as far as starting a training (see test_bad_runs.py).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from compt_megatron import cli
from compt_megatron.chain.checks import check_recipe
from compt_megatron.checkpoint.manifest import MANIFEST, manifest_bytes
from compt_megatron.errors import UserError
from compt_megatron.growth.fresh import write_fresh
from compt_megatron.recipe.load import load_recipe
from compt_megatron.spec.families import load_spec
from tests.end_to_end.tiny import model, write_recipe

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its models and data, a run checkpoint `ck`, an export `ex`, bare files `b.pt`, `b.safetensors`."""
    folder = tmp_path_factory.mktemp("kept")
    write_recipe(folder)
    write_fresh(load_spec("s.json", folder), folder / "ck", 0)
    for name, form in (("ex", "open_clip"), ("b.pt", "open_clip"), ("b.safetensors", "open_clip")):
        assert cli.main(["convert", str(folder / "ck"), str(folder / name), "--format", form]) == 0
    for name in ("b.pt", "b.safetensors"):
        (folder / f"{name}.{MANIFEST}").unlink()
    return folder


@pytest.fixture
def here(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `kept` to spoil, as the working directory."""
    shutil.copytree(kept, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "here"


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {
        str(path.relative_to(folder)): b"" for path in folder.rglob("*") if path.is_dir()
    }


def refused(here: Path, capsys: Capture, *argv: str, say: tuple[str, ...] | list[str]) -> None:
    """The command must end with status 2, one line on stderr holding every text of `say`, and an untouched folder."""
    before = _listing(here)
    code = cli.main(argv)
    out, err = capsys.readouterr()
    assert code == 2, (argv, code, out, err)
    assert err.count("\n") == 1, err
    assert err.startswith("compt"), err
    for text in say:
        assert text in err, err
    assert _listing(here) == before


def change(path: Path, place: str, value: Any) -> None:
    """Set (or with `...` delete) one value of a YAML or JSON file by its dotted path."""
    content = yaml.safe_load(path.read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner = content
    for part in parents:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))


RECIPES: list[tuple[str, Any, str]] = [
    ("sead", 1, "sead: unknown key; did you mean 'seed'?"),
    ("data.batchsize", 1, "data.batchsize: unknown key; did you mean 'batch_size'?"),
    ("links.1.epoch", 1, "links.1.epoch: unknown key"),
    ("links.1.optimizer", {"l_r": 1.0}, "links.1.optimizer.l_r: unknown key; did you mean 'lr'?"),
    ("data.batch_size", "many", "an integer >= 1, not 'many'"),
    ("data.batch_size", True, "not true"),
    ("data.batch_size", 0, "data.batch_size: needs an integer >= 1, not 0"),
    ("data.batch_size", ..., "data.batch_size: is missing"),
    ("data.captions", 0, "data.captions: needs an integer >= 1 and <= 1024, not 0"),
    ("data.caption_key", "cap", "data.caption_key: needs one of txt, json or null"),
    ("data.train", [], "data.train: names no source"),
    ("data.train", "", "names no source"),
    ("data.train", "nope.tar", "data.train: nope.tar does not exist"),
    ("data.train", "sh/{00000.tar", "not a valid shard pattern"),
    ("data.train", "foo://x/y.tar", "nothing opens foo://"),
    ("data.train", "a" * 300 + ".tar", "too long"),
    ("data.eval", ["emoji/held_out"], "emoji has no split 'held_out'"),
    ("data.augment", {"scale": [0.9, 0.5]}, "data.augment.scale: [0.9, 0.5] is not [least, most]"),
    ("data.streams", 3, "data.streams is 3"),
    ("optimizer.lr", -1.0, "optimizer.lr: needs a number > 0, not -1.0"),
    ("optimizer.lr", float("nan"), "not nan"),
    ("parallel", {"tensor": 3}, "parallel.tensor is 3, which does not fit: its vision tower has 2 heads"),
    ("parallel", {"tensor": 2}, "its vision tower has 3 heads, which tensor does not divide; the nearest layout"),
    ("parallel", {"micro_batches": 5}, "data.batch_size 32 is not divisible by 1 data-parallel ranks x 5 micro"),
    ("links.1.align", {"tensor": 2}, "align.tensor is 2, which does not divide the 1 ranks of one copy of the student"),
    ("seed", -1, "seed: needs an integer >= 0"),
    ("links", {"a": 1}, "links: needs a list of at least 1, not a section"),
    ("links.1.name", "s", "the name 's' is taken"),
    ("links.0.name", "cache", "cannot name a folder of the run"),
    ("links.0.name", "a" * 101, "cannot name a folder of the run"),
    ("links.0.name", "a\nb", "cannot name a folder of the run"),
    ("links.0.name", "a.partial", "cannot name a folder of the run"),
    ("links.0.model", "sss.json", "links.0.model: model config 'sss.json' not found"),
    ("links.0.init", "nope.pt", "links.0.init: nope.pt: no such file"),
    ("links.1.grow", {"operator": "exact", "axes": {"foo": "tile"}}, "no axis is called 'foo'"),
    ("links.1.grow", {"operator": "reference", "depth": "stack"}, "knows only depth 'interleave'"),
    ("controls.0.link", "x", "no link is called 'x'"),
    ("objective", {"name": "classify"}, "needs a model without text_cfg"),
    ("objective", {"name": "siglip"}, "init_logit_bias"),
    ("evaluate", {"templates": ["x"]}, "template 'x' has no '{}'"),
]


@pytest.mark.parametrize(("place", "value", "say"), RECIPES)
def test_recipe(here: Path, capsys: Capture, place: str, value: Any, say: str) -> None:
    change(here / "tiny.yaml", place, value)
    if place.startswith("data."):
        _checked(say)
    else:
        refused(here, capsys, "plan", "tiny.yaml", say=[say])


def _checked(say: str) -> None:
    """The check that `train` begins with, sources and tokenizer included, in one line."""
    with pytest.raises(UserError) as caught:
        check_recipe(load_recipe("tiny.yaml"))
    assert say in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_teacher_that_cannot_be_split(here: Path) -> None:
    change(here / "tiny.yaml", "links.2.parallel", {"tensor": 4})
    change(here / "tiny.yaml", "links.2.align", {"tensor": 4})
    with pytest.raises(
        UserError, match=r"but of the teacher its vision tower has 3 heads.*; the nearest that works is 1"
    ):
        check_recipe(load_recipe(here / "tiny.yaml"), world=4, data=False)


@pytest.mark.parametrize(
    ("content", "say"),
    [
        (b"", "a mapping of keys to values"),
        (bytes(range(128, 200)), "cannot be read"),
        (b"name: a\nname: b\n", "line 2: key 'name' is given twice"),
        (b"a: &x [*x]\n", "not valid YAML"),
        (b"name: [\n", "not valid YAML: line"),
        (b"name: 2020-13-45\n", "not valid YAML: a value cannot be understood"),
        (b"seed: " + b"9" * 5000 + b"\n", "not valid YAML"),
        (b"[" * 3000, "not valid YAML: nested too deeply"),
        (b"1: a\n", "is missing"),
        (b"a: !!python/object/apply:os.mkdir [ran]\n", "could not determine a constructor"),
    ],
)
def test_recipe_file(here: Path, capsys: Capture, content: bytes, say: str) -> None:
    (here / "r.yaml").write_bytes(content)
    refused(here, capsys, "train", "r.yaml", say=["r.yaml", say])


def test_yaml_anchors_and_merges_are_allowed(here: Path, capsys: Capture) -> None:
    text = (here / "tiny.yaml").read_text()
    (here / "tiny.yaml").write_text(f"{text}evaluate: &e {{retrieval: false}}\nparallel: {{<<: &p {{zero: 1}}}}\n")
    assert cli.main(["train", "tiny.yaml", "--print-recipe"]) == 0
    assert "retrieval: false" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "say"),
    [
        ("data.batchsize=1", "data.batchsize=1: unknown key; did you mean 'batch_size'?"),
        ("=1", "an override is written key=value"),
        ("links.².epochs=1", "links has no entry '²'"),
        ("links.9.steps=1", "links has 3 entries, numbered from 0 to 2"),
        ("seed=[1", "the value is not YAML"),
        ("seed=" + "9" * 5000, "the value is not YAML"),
        ("optimizer.lr=1e400", "needs a number > 0, not inf"),
    ],
)
def test_override(here: Path, capsys: Capture, override: str, say: str) -> None:
    refused(here, capsys, "train", "tiny.yaml", override, say=[say])


MODELS: list[tuple[str, Any, str]] = [
    ("vision_cfg", ..., "not a model config of a known family"),
    ("vision_cfg", None, "'vision_cfg' must be a JSON object, not None"),
    ("text_cfg", [1], "'text_cfg' must be a JSON object"),
    ("vision_cfg.widht", 3, "unknown or unsupported field 'widht'"),
    ("vision_cfg.width", "48", "'width' must be a positive integer, not '48'"),
    ("vision_cfg.width", -48, "'width' must be a positive integer"),
    ("vision_cfg.layers", 2**31, "no more than 1024 is supported"),
    ("vision_cfg.head_width", 17, "width 48 is not divisible by head_width 17"),
    ("vision_cfg.mlp_ratio", "4", "'mlp_ratio' must be a number above 0"),
    ("vision_cfg.image_size", 33, "image_size 33 is not divisible by patch_size 16"),
    ("vision_cfg.patch_size", 8, "the patch size differs, 16 in the source, 8 in the target"),
    ("vision_cfg.image_size", 64, "the image size differs"),
    ("vision_cfg.width", 16, "the width would shrink from 32 to 16"),
    ("text_cfg.heads", 5, "width 48 is not divisible by heads 5"),
    ("text_cfg.vocab_size", 2048, "the vocabulary size differs"),
    ("text_cfg.context_length", 16, "the context length differs"),
    ("text_cfg.norm_kwargs", 5, "'norm_kwargs' must be a JSON object"),
    ("embed_dim", 8, "would shrink from 16 to 8"),
    ("quick_gelu", True, "the activation differs"),
    ("init_logit_scale", "x", "'init_logit_scale' must be a number"),
]


@pytest.mark.parametrize(("place", "value", "say"), MODELS)
def test_model(here: Path, capsys: Capture, place: str, value: Any, say: str) -> None:
    change(here / "m.json", place, value)
    refused(here, capsys, "grow", "ck", "out", "--to", "m.json", say=[say])
    refused(here, capsys, "plan", "tiny.yaml", say=[say])


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b"[" * 100000, b'{"embed_dim": NaN}'])
def test_model_file(here: Path, capsys: Capture, content: bytes) -> None:
    (here / "m.json").write_bytes(content)
    refused(here, capsys, "grow", "ck", "out", "--to", "m.json", say=["m"])


@pytest.mark.parametrize(
    ("kwargs", "say"),
    [
        ({"bpe_path": "nope.txt.gz"}, "tokenizer vocabulary 'nope.txt.gz'"),
        ({"bpe_path": "emoji.tar"}, "open_clip's tokenizer refuses them"),
        ({"bpepath": "x"}, "unexpected keyword argument 'bpepath'"),
    ],
)
def test_tokenizer(here: Path, kwargs: dict[str, str], say: str) -> None:
    change(here / "s.json", "text_cfg.tokenizer_kwargs", kwargs)
    _checked(say)


def test_a_vocabulary_larger_than_the_models(here: Path) -> None:
    for name in ("s", "m", "l"):
        change(here / f"{name}.json", "text_cfg.vocab_size", 512)
    _checked("has 1024 tokens, text_cfg.vocab_size is 512")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


COMMANDS = [
    ["grow", "CK", "out", "--to", "m.json"],
    ["convert", "CK", "out", "--format", "open_clip"],
    ["verify", "CK"],
    ["export", "CK", "out"],
]


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
@pytest.mark.parametrize(
    "file",
    [
        *(f"ck/{name}" for name in ("__0_0.distcp", ".metadata", "common.pt", "metadata.json", MANIFEST)),
        *(f"ex/{name}" for name in ("open_clip_model.safetensors", "open_clip_config.json", MANIFEST)),
    ],
)
def test_damaged_checkpoint(here: Path, capsys: Capture, file: str, damage: Callable[[Path], None]) -> None:
    """Every file, every command that reads: a file that a command does not need may not be broken either."""
    if file == f"ex/{MANIFEST}" and damage is Path.unlink:
        return  # then it is a foreign open_clip folder, and whole
    damage(here / file)
    folder = file.partition("/")[0]
    for command in COMMANDS:
        refused(here, capsys, *[folder if text == "CK" else text for text in command], say=[folder])
    if not (file.endswith("distcp") and damage is _flip):  # `inspect` reads no data, only the description
        refused(here, capsys, "inspect", folder, say=[folder])


@pytest.mark.parametrize(
    ("place", "value"),
    [("files", ...), ("files", {"common.pt": None}), ("checksums", []), ("spec", {"name": "s"}), ("tensors", {"a": 1})],
)
def test_compt_json_that_says_less_than_it_must(here: Path, capsys: Capture, place: str, value: Any) -> None:
    """Its own checksum is right: it was written so."""
    content = json.loads((here / "ck" / MANIFEST).read_text())
    content |= {place: value}
    kept = {key: entry for key, entry in content.items() if entry is not ... and key != "self"}
    (here / "ck" / MANIFEST).write_bytes(manifest_bytes(kept))
    refused(here, capsys, "inspect", "ck", say=["ck/compt.json: lacks entries"])


def _set(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[Any, Any]], None]:
    return lambda state: state.update({key: make(state[key])})


STATES: list[tuple[str, Callable[[dict[Any, Any]], Any], str]] = [
    ("missing", lambda state: state.pop("visual.proj"), "it has no 'visual.proj'"),
    ("extra", lambda state: state.update({"visual.extra": torch.zeros(2)}), "it also has 'visual.extra'"),
    ("shape", _set("visual.proj", lambda value: value[:3].clone()), "'visual.proj' has shape (3, 16)"),
    ("integers", _set("visual.proj", lambda value: value.to(torch.int32)), "weights must be float32"),
    ("complex", _set("visual.proj", lambda value: value.to(torch.complex64)), "convert it first"),
    ("empty", lambda state: state.clear(), "b."),
]


@pytest.mark.parametrize("file", ["b.pt", "b.safetensors"])
@pytest.mark.parametrize(("spoil", "say"), [case[1:] for case in STATES], ids=[case[0] for case in STATES])
def test_state_dict_of_another_model(
    here: Path, capsys: Capture, file: str, spoil: Callable[[dict[Any, Any]], Any], say: str
) -> None:
    state = safetensors.torch.load_file(here / "b.safetensors")
    spoil(state)
    torch.save(state, here / file) if file == "b.pt" else safetensors.torch.save_file(state, here / file)
    refused(here, capsys, "grow", file, "out", "--to", "m.json", "--from", "s.json", say=[file, say])


def test_weights_that_are_not_finite_are_found_by_verify(here: Path, capsys: Capture) -> None:
    state = safetensors.torch.load_file(here / "b.safetensors")
    state["visual.proj"][0, 0] = float("nan")
    torch.save(state, here / "b.pt")
    refused(here, capsys, "verify", "b.pt", "--from", "s.json", say=["'weight/visual.proj'", "not finite"])


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), {"visual.proj": 3}, {1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}, _Evil()],
    ids=["list", "tensor", "numbers", "unnamed", "sparse", "malicious"],
)
def test_torch_file_of_something_else(here: Path, capsys: Capture, content: Any) -> None:
    torch.save(content, here / "b.pt")
    for command in (["inspect", "b.pt"], ["verify", "b.pt"], ["grow", "b.pt", "out", "--to", "m.json"]):
        refused(here, capsys, *command, "--from", "s.json", say=["b.pt"])
    assert not (here / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("b.pt", b""),
        ("b.pt", b"PK\x03\x04" + bytes(200)),
        ("b.pt", pickle.dumps(_Evil())),
        ("b.safetensors", b""),
        ("b.safetensors", struct.pack("<Q", 2**62) + b"{}"),
        ("b.safetensors", struct.pack("<Q", 2**39) + b"{}"),
    ],
)
def test_weights_file_of_garbage(here: Path, capsys: Capture, file: str, content: bytes) -> None:
    (here / file).write_bytes(content)
    refused(here, capsys, "inspect", file, "--from", "s.json", say=[file])
    assert not (here / "ran").exists()


@pytest.mark.parametrize(
    ("argv", "say"),
    [
        ("grow nowhere out --to m.json", "nowhere: does not exist"),
        ("grow ck out --to ViT-B-17", "did you mean 'ViT-B-16'?"),
        ("grow ck out --to l.json --depth foo", "foo"),
        ("grow ck out --to m.json --format opneclip", "did you mean 'open_clip'?"),
        ("grow ck out.pt --to m.json --format megatron", "a megatron checkpoint is a folder"),
        ("grow b.pt out --to m.json", "name its model config with --from"),
        ("grow b.pt out --to m.json --from l.json", "checkpoint of another model than 'l'"),
        ("grow ck --to m.json --overwrite ck", "ck: is the source itself"),
        ("grow ck ck/x --to m.json", "lie inside each other"),
        ("convert ck . --format open_clip", "lie inside each other"),
        ("grow ck ex --to m.json", "ex: exists already"),
        ("grow ck s.json --to m.json --overwrite", "s.json: is a file"),
        ("grow ck s.json/x --to m.json", "cannot be written there"),
        ("grow ck x.partial --to m.json", "kept for unfinished checkpoints"),
        ("grow ck " + "x" * 300 + " --to m.json", "File name too long"),
        ("grow " + "x" * 300 + " out --to m.json", "File name too long"),
        ("export ck out --format hf", "hf holds language models"),
        ("inspect .", "not a checkpoint of a known format"),
        ("verify ck --against nope", "ck: has no growth certificate"),
        ("eval ex --data emoji.tar --template x", "'x' has no '{}'"),
        ("eval ex --data emoji.tar --batch-size 0", "'0' is not a whole number above 0"),
        ("plan tiny.yaml --ranks -1", "'-1' is not a whole number above 0"),
        ("train", "the following arguments are required: RECIPE"),
        ("train .", "is a folder"),
        ("report .", "no chain.json in it"),
        ("data emoji .", "is not an empty folder"),
        ("data emoji d --size 0", "emoji size 0"),
    ],
)
def test_arguments(here: Path, capsys: Capture, argv: str, say: str) -> None:
    refused(here, capsys, *argv.split(), say=[say])


def test_an_unfinished_checkpoint_is_not_read_by_any_path(here: Path, capsys: Capture) -> None:
    (here / "ck").rename(here / "ck.partial")
    (here / "b.pt.partial").mkdir()
    shutil.copy(here / "b.pt", here / "b.pt.partial")
    for path in ("ck.partial", "b.pt.partial/b.pt"):
        refused(here, capsys, "grow", path, "out", "--to", "m.json", "--from", "s.json", say=[path, "unfinished"])


def test_two_checkpoints_in_one_folder(here: Path, capsys: Capture) -> None:
    shutil.copy(here / "ex" / "open_clip_model.safetensors", here / "ck")
    refused(here, capsys, "inspect", "ck", say=["holds two checkpoints (megatron and open_clip)"])


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"format_version": 9}', b'{"format_version": 1, "links": [{"name": 1}]}'],
)
def test_ledger(here: Path, capsys: Capture, content: bytes) -> None:
    (here / "run").mkdir()
    (here / "run" / "chain.json").write_bytes(content)
    refused(here, capsys, "verify", "run", say=["run/chain.json"])


def test_paths_may_have_spaces_and_any_letters(here: Path, capsys: Capture) -> None:
    folder = here / "ünï cødé 🎉"
    (here / "ck").rename(folder)
    (here / "m.json").rename(here / "größer als s.json")
    assert cli.main(["grow", str(folder), "a b.pt", "--to", "größer als s.json"]) == 0, capsys.readouterr().err
    assert cli.main(["verify", "a b.pt", "--against", str(folder)]) == 0, capsys.readouterr().err


def test_models_config_is_the_one_under_test(kept: Path) -> None:
    """The cases above change 48 and 16: the tiny models must have them."""
    assert json.loads((kept / "m.json").read_text()) == model(48, 3, 2)
