"""Transforms and tokenizers are open_clip's, and an exported tokenizer works in open_clip from anywhere."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_samples import png
from PIL import Image

from compt_megatron.data.seeds import forked_random_state, seed_all
from compt_megatron.data.tokenizer import build_tokenizer, export_tokenizer
from compt_megatron.data.transforms import ImageTransform, eval_transform, train_transform
from compt_megatron.errors import UserError
from compt_megatron.torchvision_mend import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2  # noqa: E402

EMOJI: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 1024, "width": 16, "heads": 2, "layers": 1}
    | {"tokenizer_kwargs": {"bpe_path": "models/emoji-bpe.txt.gz"}},
}
CAPTIONS = ["grinning face", "a Person in  lotus position: dark skin tone", "", "flag & ünïcode 你好", "face " * 40]


def pictures() -> list[Image.Image]:
    import io

    return [Image.open(io.BytesIO(png(seed, size))).convert("RGB") for seed, size in enumerate((32, 32, 40, 57))]


def run(transform: ImageTransform, whole_batch: bool) -> torch.Tensor:
    results = []
    with forked_random_state():
        for number, image in enumerate(pictures()):
            seed_all(number)
            results.append(transform.prepare(image) if whole_batch else transform(image))
    return transform.finish(results) if whole_batch else torch.stack(results)


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"scale": [0.4, 1.0]},
        {"color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_prob": 0.8, "gray_scale_prob": 0.2},
        {"use_timm": True, "scale": [0.6, 1.0], "ratio": [0.8, 1.2], "re_prob": 0.5, "color_jitter": 0.4},
    ],
)
def test_training_transforms_equal_open_clips_to_the_bit(augment: dict[str, Any]) -> None:
    ours = train_transform(EMOJI, augment)
    theirs = image_transform_v2(PreprocessCfg(size=32), is_train=True, aug_cfg=AugmentationCfg(**augment))
    expected = run(ImageTransform(theirs), whole_batch=False)
    assert torch.equal(run(ours, whole_batch=False), expected)
    assert torch.equal(run(ours, whole_batch=True), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(ours)), whole_batch=True), expected)


def test_evaluation_transform_is_open_clips_with_its_preprocess_options() -> None:
    options = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
    for preprocess in (None, options):
        theirs = image_transform_v2(PreprocessCfg(size=32, **(preprocess or {})), is_train=False)
        ours = eval_transform(EMOJI, preprocess)
        expected = torch.stack([theirs(image) for image in pictures()])
        assert expected.shape == (4, 3, 32, 32)
        assert torch.equal(torch.stack([ours(image) for image in pictures()]), expected)
        assert torch.equal(ours.finish([ours.prepare(image) for image in pictures()]), expected)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"scael": [0.5, 1]}, r"data.augment: unknown option 'scael'; did you mean 'scale'\?"),
        ({"ratio": [0.5, 1]}, r"data.augment.ratio: open_clip applies it with use_timm: true only"),
        ({"color_jitter_prob": 0.5}, r"data.augment.color_jitter: needs four numbers"),
        ({"color_jitter": [1, 1, 1, 0]}, r"has no effect without color_jitter_prob"),
    ],
)
def test_options_that_open_clip_would_ignore_are_errors(augment: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_transform(EMOJI, augment)


def test_tokens_are_open_clips() -> None:
    plain = {
        "embed_dim": 16,
        "vision_cfg": EMOJI["vision_cfg"],
        "text_cfg": {"context_length": 20, "vocab_size": 49408},
    }
    tokenizer = build_tokenizer(plain)
    expected = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS, context_length=20)
    for _ in range(2):  # the second time from memory
        assert torch.equal(tokenizer(CAPTIONS), expected)
    assert torch.equal(tokenizer(CAPTIONS[::-1]), expected.flip(0))
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(CAPTIONS), expected)
    assert tokenizer([]).shape == (0, 20)
    assert build_tokenizer(EMOJI)(CAPTIONS).max() == 1023


def test_an_export_tokenizes_in_open_clip_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, partial, moved = (tmp_path / name for name in ("export", "export.partial", "moved"))
    config, files = export_tokenizer(EMOJI, final)
    partial.mkdir()
    for name, source in files.items():
        shutil.copyfile(source, partial / name)
    model = open_clip.model.CLIP(EMOJI["embed_dim"], EMOJI["vision_cfg"], EMOJI["text_cfg"])
    torch.save(model.state_dict(), partial / "open_clip_pytorch_model.bin")
    (partial / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    partial.rename(final)
    monkeypatch.chdir(tmp_path.parent)
    expected = build_tokenizer(EMOJI)(CAPTIONS)
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{final}")
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{final}")(CAPTIONS), expected)
    assert torch.equal(loaded.encode_text(expected), model.encode_text(expected))
    image = pictures()[3]
    assert torch.equal(preprocess(image), eval_transform(EMOJI)(image))
    final.rename(moved)
    assert torch.equal(build_tokenizer(config, beside=moved)(CAPTIONS), expected)
    vocabulary = str(moved / next(iter(files)))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{moved}", bpe_path=vocabulary)(CAPTIONS), expected)
    assert export_tokenizer({"model_cfg": EMOJI}, final)[0] == config  # the wrapping of open_clip_config.json
    assert EMOJI["text_cfg"]["tokenizer_kwargs"]["bpe_path"] == "models/emoji-bpe.txt.gz"


def test_a_tokenizer_that_does_not_fit_the_model_is_refused() -> None:
    def with_text(**changes: Any) -> dict[str, Any]:
        config = copy.deepcopy(EMOJI)
        config["text_cfg"].update(changes)
        return config

    with pytest.raises(UserError, match=r"has 1024 tokens, text_cfg.vocab_size is 1000; set it to at least 1024"):
        build_tokenizer(with_text(vocab_size=1000))
    with pytest.raises(UserError, match=r"vocabulary 'no/such.gz' .* was not found beside the recipe"):
        build_tokenizer(with_text(tokenizer_kwargs={"bpe_path": "no/such.gz"}))
    with pytest.raises(UserError, match=r"text_cfg.eos_id is 2, the tokenizer ends with 1023"):
        build_tokenizer(with_text(pool_type="eos"))
    more = {"bpe_path": "models/emoji-bpe.txt.gz", "additional_special_tokens": ["<x>"]}
    with pytest.raises(UserError, match=r"needs the end of text as the last token"):
        build_tokenizer(with_text(vocab_size=1025, tokenizer_kwargs=more))
    with pytest.raises(UserError, match=r"plain ViT has no tokenizer"):
        build_tokenizer({"embed_dim": 3, "vision_cfg": {}})
