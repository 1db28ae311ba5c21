"""Our models against open_clip's own on the named configs: features of the same random weights, fp32, no downloads.

    python benchmarks/open_clip_parity.py                      # all in configs/models up to 600 M parameters
    python benchmarks/open_clip_parity.py ViT-B-32 compt-ViT-T-16

Prints the relative error |ours - open_clip| / |open_clip| of image and text features and adds it to
benchmarks/results/open_clip_parity.json. The unit tests use the same reference and the same comparison.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compt_megatron.models.build import build_model
from compt_megatron.models.state import load_canonical
from compt_megatron.spec.families import load_spec
from compt_megatron.spec.open_clip_names import open_clip_place
from compt_megatron.spec.table import ModelSpec
from compt_megatron.torchvision_mend import ensure_torchvision

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "open_clip_parity.json"
TOLERANCE = 1e-5
LARGEST = 600_000_000  # parameters of a model that is compared without being named: two copies, fp32


def open_clip_model(config: dict[str, Any], seed: int = 0, noise: float = 0.02) -> nn.Module:
    """open_clip's model of `config` with its own initialisation plus noise, so that no bias is 0 and no gamma is 1.

    A config without text_cfg gets a small text tower, which open_clip's class needs; nobody looks at it.
    """
    ensure_torchvision()
    from open_clip.model import CLIP, CustomTextCLIP

    torch.manual_seed(seed)
    text_cfg = config.get("text_cfg") or {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    fields = {**config, "text_cfg": text_cfg}
    kind = CustomTextCLIP if fields.pop("custom_text", False) else CLIP
    model = kind(**fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model


def canonical_from_open_clip(spec: ModelSpec, tensors: dict[str, Tensor]) -> Callable[[str], Tensor]:
    """`get` for load_canonical: canonical name -> its rows of an open_clip state dict (or dict of gradients)."""

    def get(name: str) -> Tensor:
        place = open_clip_place(spec, name)
        tensor = tensors[place.key]
        return tensor if place.rows is None else tensor[place.start : place.start + place.rows]

    return get


def probe(spec: ModelSpec, batch: int, seed: int = 1) -> tuple[Tensor, Tensor | None]:
    """Random images [batch, 3, H, W] and texts [batch, context] that end, at random places, with the highest id."""
    generator = torch.Generator().manual_seed(seed)
    size = spec.config["vision_cfg"].get("image_size", 224)
    images = torch.randn(batch, 3, size, size, generator=generator)
    if "text" not in spec.towers:
        return images, None
    context, vocab = spec.towers["text"].tokens, spec.params["token_embedding.weight"].shape[0]
    texts = torch.randint(1, vocab - 1, (batch, context), generator=generator)
    for row in texts:
        end = int(torch.randint(2, context, (), generator=generator))
        row[end], row[end + 1 :] = vocab - 1, 0
    return images, texts


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, 2-norms in fp64 over the whole tensor."""
    reference = reference.double()
    return float((ours.double() - reference).norm() / reference.norm())


def compare(name: str, batch: int) -> dict[str, Any]:
    """Features of model config `name` in both implementations -> relative errors and seconds of each forward."""
    spec = load_spec(name)
    reference = open_clip_model(spec.config)
    model = build_model(spec).eval()
    load_canonical(model, spec, canonical_from_open_clip(spec, reference.state_dict()))
    images, texts = probe(spec, batch)
    result: dict[str, Any] = {"parameters": spec.numel, "batch": batch}
    with torch.no_grad():
        start = time.process_time()
        expected = {"image": reference.encode_image(images)}
        if texts is not None:
            expected["text"] = reference.encode_text(texts)
        middle = time.process_time()
        outputs = model(images, texts)
        end = time.process_time()
    result.update({f"{kind}_relative_error": relative_error(outputs[kind], expected[kind]) for kind in expected})
    result.update(open_clip_cpu_s=round(middle - start, 2), our_cpu_s=round(end - middle, 2))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="model configs (default: all in configs/models)")
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    packaged = sorted(path.stem for path in (ROOT / "configs" / "models").glob("*ViT-*.json"))
    names = arguments.models or [name for name in packaged if load_spec(name).numel <= LARGEST]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = []
    for name in names:
        result = compare(name, arguments.batch)
        result["machine"] = f"{platform.machine()} CPU, torch {torch.__version__}"
        results[name] = result
        errors = {key: value for key, value in result.items() if key.endswith("_relative_error")}
        print(name, *(f"{key}={value:.2e}" for key, value in errors.items()), flush=True)
        failed += [name] if max(errors.values()) > TOLERANCE else []
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    if failed:
        raise SystemExit(f"above {TOLERANCE:g}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
