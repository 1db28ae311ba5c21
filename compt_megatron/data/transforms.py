"""open_clip's own image transforms, for training and evaluation, from the model config and the recipe's options."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image

from compt_megatron.errors import UserError
from compt_megatron.torchvision_mend import ensure_torchvision

_TIMM_ONLY = ("ratio", "re_prob", "re_count")


class ImageTransform:
    """One of open_clip's transforms, and the same thing over a batch: the closing ToTensor and Normalize are applied
    to all images at once (the same arithmetic for each element, a fraction of the time for small images)."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], made_by: tuple[Any, ...] = ()) -> None:
        self.transform, self._made_by = transform, made_by
        self._before: list[Callable[[Any], Any]] = []
        self._normalize: Any = None
        steps = getattr(transform, "transforms", [])
        names = [type(step).__name__ for step in steps]
        if len(names) >= 2 and names[-2] in ("MaybeToTensor", "ToTensor") and names[-1] == "Normalize":
            self._before, self._normalize = list(steps[:-2]), steps[-1]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> [3, H, W] float32."""
        return self.transform(image)

    def __reduce__(self) -> Any:
        """Worker processes make their own by (function, *arguments): unpickling torchvision's objects would import it
        before `ensure_torchvision` could help."""
        function, *arguments = self._made_by
        return function, tuple(arguments)

    def prepare(self, image: Image.Image) -> Any:
        """The part that differs from image to image: everything random happens here."""
        if self._normalize is None:
            return self.transform(image)
        for step in self._before:
            image = step(image)
        return image

    def finish(self, prepared: Sequence[Any]) -> torch.Tensor:
        """[b, 3, H, W] float32 of the prepared images."""
        if self._normalize is None or not all(isinstance(image, Image.Image) for image in prepared):
            return torch.stack(
                [image if isinstance(image, torch.Tensor) else self.transform(image) for image in prepared]
            )
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in prepared]))
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return self._normalize(images)


def _preprocess(config: dict[str, Any], preprocess: dict[str, Any] | None) -> Any:
    ensure_torchvision()
    from open_clip.transform import PreprocessCfg

    options = dict(preprocess or {})
    _known(options, [*asdict(PreprocessCfg())], "preprocess")
    options["size"] = config.get("vision_cfg", {}).get("image_size", 224)
    return PreprocessCfg(**options)


def _known(options: dict[str, Any], fields: list[str], where: str) -> None:
    for key in options:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"open_clip has {', '.join(fields)}"
            raise UserError(f"data.{where}: unknown option {key!r}; {hint}")


def eval_transform(config: dict[str, Any], preprocess: dict[str, Any] | None = None) -> ImageTransform:
    """Resize, centre crop and normalise for the model `config` (open_clip's JSON). `preprocess`: fields of open_clip's
    PreprocessCfg (mean, std, interpolation, resize_mode, ...)."""
    cfg = _preprocess(config, preprocess)
    from open_clip.transform import image_transform_v2

    return ImageTransform(image_transform_v2(cfg, is_train=False), (eval_transform, config, preprocess))


def train_transform(
    config: dict[str, Any], augment: dict[str, Any] | None = None, preprocess: dict[str, Any] | None = None
) -> ImageTransform:
    """Random crop and the augmentations of `augment`: fields of open_clip's AugmentationCfg (scale, ratio,
    color_jitter, color_jitter_prob, gray_scale_prob, re_prob, re_count, use_timm); with `use_timm` also those of
    timm's create_transform (auto_augment, ...).

    Raises UserError for an unknown option and for one that open_clip would silently ignore.
    """
    cfg = _preprocess(config, preprocess)
    from open_clip.transform import AugmentationCfg, image_transform_v2

    options = dict(augment or {})
    _known(options, [*asdict(AugmentationCfg())], "augment")
    if not options.get("use_timm", False):
        for key in _TIMM_ONLY:
            if options.get(key) is not None:
                raise UserError(
                    f"data.augment.{key}: open_clip applies it with use_timm: true only; set that or remove it"
                )
        if options.get("color_jitter_prob") and len(options.get("color_jitter") or ()) != 4:
            raise UserError("data.augment.color_jitter: needs four numbers (brightness, contrast, saturation, hue)")
        jitter = options.pop("color_jitter", None)
        if jitter is not None and not options.get("color_jitter_prob"):
            raise UserError("data.augment.color_jitter: has no effect without color_jitter_prob; set both")
        if jitter is not None:
            options["color_jitter"] = tuple(jitter)
    for key in ("scale", "ratio"):
        if options.get(key) is not None:
            options[key] = least, most = tuple(options[key])
            if not 0 < least <= most or (key == "scale" and most > 1):
                limit = "0 < least <= most <= 1" if key == "scale" else "0 < least <= most"
                raise UserError(f"data.augment.{key}: [{least}, {most}] is not [least, most] with {limit}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unused augmentation cfg items")  # it lists used ones, too
        transform = image_transform_v2(cfg, is_train=True, aug_cfg=AugmentationCfg(**options))
    return ImageTransform(transform, (train_transform, config, augment, preprocess))
