"""Names, fusing and building: what goes in by canonical names comes out bit for bit, and nothing is left over."""

from dataclasses import replace

import pytest
import torch

from compt_megatron.models.block import transformer_config
from compt_megatron.models.build import build_model
from compt_megatron.models.groups import model_groups
from compt_megatron.models.part import ModelPart
from compt_megatron.models.state import canonical_state, fuse, load_canonical, module_to_canonical, split_fused
from compt_megatron.models.towers import TextTower, TowerPlace, VisionTower
from compt_megatron.spec.families import load_spec, spec_from_config
from compt_megatron.spec.table import ModelSpec

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 24, "heads": 3, "layers": 2},
    "init_logit_bias": -10,
}


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return spec_from_config(CONFIG, "test")


def random_values(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(param.shape, generator=generator).to(dtype) for name, param in spec.params.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(spec: ModelSpec, dtype: torch.dtype) -> None:
    values = random_values(spec, dtype)
    model = build_model(spec, dtype=dtype)
    load_canonical(model, spec, values.__getitem__)
    state = canonical_state(model, spec)
    assert list(state) == list(spec.params)
    assert all(state[name].dtype == dtype and torch.equal(state[name], values[name]) for name in values)


def test_qkv_is_interleaved_by_head(spec: ModelSpec) -> None:
    """Head h of the fused tensor is [q_h, k_h, v_h], as Megatron's files have it."""
    module_name = "vision.decoder.layers.1.self_attention.linear_qkv.weight"
    names = module_to_canonical(spec)[module_name]
    assert [name.split(".")[-2] for name in names] == ["q_proj", "k_proj", "v_proj"]
    values = random_values(spec)
    fused = fuse(spec, module_name, {name: values[name] for name in names})
    heads = torch.stack([values[name].view(4, 8, 32) for name in names], dim=1)
    assert torch.equal(fused.view(4, 3, 8, 32), heads)
    parts = split_fused(spec, module_name, fused)
    assert all(torch.equal(parts[name], values[name]) for name in names)


def test_scalars_are_rows_of_one_in_the_module(spec: ModelSpec) -> None:
    """DeepSpeed cannot broadcast 0-D parameters; the table and files have them 0-D."""
    model = build_model(spec)
    for name in ("logit_scale", "logit_bias"):
        assert model.get_parameter(name).shape == (1,)
        assert spec.params[name].shape == split_fused(spec, name, torch.ones(1))[name].shape == ()
        assert fuse(spec, name, {name: torch.ones(())}).shape == (1,)


def test_wrong_shape_is_refused(spec: ModelSpec) -> None:
    values = random_values(spec)
    values["ln_final.weight"] = torch.zeros(1)  # would broadcast
    with pytest.raises(AssertionError, match=r"ln_final\.weight"):
        load_canonical(build_model(spec), spec, values.__getitem__)


@pytest.mark.parametrize("name", ["ViT-L-14", "compt-ViT-B-16"])
def test_named_models_have_the_parameters_of_the_table(name: str) -> None:
    """On no device: every parameter has a canonical name and the table's shape, and nothing is allocated."""
    spec = load_spec(name)
    model = build_model(spec, meta=True)
    shapes = {}
    for module_name, parameter in model.named_parameters():
        assert parameter.is_meta
        shapes.update({n: tuple(t.shape) for n, t in split_fused(spec, module_name, parameter.detach()).items()})
    assert shapes == {n: param.shape for n, param in spec.params.items()}


def test_stages_of_a_pipeline_make_the_whole_tower(spec: ModelSpec) -> None:
    """A stage without head feeding a stage without embeddings gives the features of the undivided towers."""
    values = random_values(spec)
    whole = build_model(spec)
    load_canonical(whole, spec, values.__getitem__)
    whole_state = whole.state_dict()
    images, texts = torch.randn(3, 3, 16, 16), torch.randint(0, 20, (3, 6))
    for kind, cls, inputs, options in (
        ("vision", VisionTower, images, {"patch": 8}),
        ("text", TextTower, texts, {"vocab": 20, "eos": 2}),
    ):
        tower = replace(spec.towers[kind], layers=1)
        config = transformer_config(tower, torch.float32, "none", ModelPart(spec))
        first, last = (
            cls(tower, config, TowerPlace(pre, not pre, None, model_groups()), joint=16, **options)
            for pre in (True, False)
        )
        for stage, layer in ((first, 0), (last, 1)):
            renamed = {
                name.removeprefix(f"{kind}.").replace(f"decoder.layers.{layer}.", "decoder.layers.0."): tensor
                for name, tensor in whole_state.items()
                if name.startswith(f"{kind}.") and f"decoder.layers.{1 - layer}." not in name
            }
            stage.load_state_dict({name: renamed[name] for name in stage.state_dict()})
        with torch.no_grad():
            last.set_input_tensor(first(inputs))
            assert torch.equal(last(inputs), getattr(whole, kind)(inputs))


@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (4, 1, 2)])
def test_the_parts_of_all_ranks_are_the_model(tensor: int, pipeline: int, virtual: int) -> None:
    """Every element of every parameter lies on the ranks that should have it, and nowhere else."""
    text = {"context_length": 6, "vocab_size": 20, "width": 32, "heads": 4, "layers": 4}
    vision = {**CONFIG["vision_cfg"], "layers": 4}
    spec = spec_from_config({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "whole")
    values = random_values(spec)
    seen = {name: torch.zeros(param.shape, dtype=torch.int) for name, param in spec.params.items()}
    for stage in range(pipeline):
        for rank in range(tensor):
            part = ModelPart(spec, tensor, rank, pipeline, stage, virtual)
            for chunk in range(virtual):
                for names in part.names(chunk).values():
                    regions = {name: values[name][part.box(name)] for name in names}
                    fused = part.fuse(regions)
                    for name, region in part.split(names, fused).items():
                        assert torch.equal(region, regions[name])
                        seen[name][part.box(name)] += 1
    for name in spec.params:
        alike = ModelPart(spec, tensor).is_split(name)
        assert (seen[name] == (1 if alike else tensor)).all(), name
