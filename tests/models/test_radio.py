"""The RADIO tower against `transformers` on the same weights and the same pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsevila import CorruptCheckpoint, UnsupportedModel
from sparsevila.models.checkpoint import Checkpoint, ConfigReader
from sparsevila.models.interface import VisualInputs
from sparsevila.models.radio import RadioConfig, RadioTower, rename_radio
from sparsevila.models.siglip import PixelScale
from sparsevila.models.weights import load_weights
from sparsevila.quant.awq import fold_scales

CPU = torch.device("cpu")
UNIT = PixelScale((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SHAPE = {
    "hidden_size": 40, "mlp_ratio": 2.2, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "max_img_size": 72, "num_cls_tokens": 3, "num_registers": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Any, Path]:
    import transformers as hf

    torch.manual_seed(0)
    model = hf.RadioModel(hf.RadioConfig(**SHAPE, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(10)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("radio") / "tower"
    model.eval().save_pretrained(folder)
    return model, folder


def load(folder: Path) -> RadioTower:
    checkpoint = Checkpoint.open(folder, tokenizer=False)
    with torch.device("meta"):
        tower = RadioTower(RadioConfig.from_hf(ConfigReader(checkpoint.config), checkpoint.tensors), UNIT)
    load_weights(tower, checkpoint, rename_radio, tied={}, dtype=torch.float32, device=CPU)
    return tower


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def rewritten(folder: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (24, 8), (72, 72), (80, 16)], ids=str)
@torch.inference_mode()
def test_features_and_saliency_equal_transformers(pair, size):
    """Whatever the grid: smaller than the position table, as large, larger, not square."""
    hf, folder = pair
    tower = load(folder)
    pixels = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    theirs = hf(pixels.float() / 255, output_attentions=True)
    features, saliency = tower(pixels)
    assert relative(features, theirs.features) < 1e-5
    prefix = SHAPE["num_cls_tokens"] + SHAPE["num_registers"]
    want = theirs.attentions[-1][:, :, : SHAPE["num_cls_tokens"], prefix:].mean(dim=(1, 2))
    assert saliency.shape == (2, size[0] * size[1] // 64)
    assert relative(saliency, want) < 1e-5
    others = theirs.attentions[-1][:, :, :prefix, prefix:].mean(dim=(1, 2))
    assert relative(saliency, others) > 1e-3  # registers do not rate


@torch.inference_mode()
def test_the_names_in_memory_load_too(pair, tmp_path):
    hf, folder = pair
    want = load(folder)
    got = load(rewritten(folder, tmp_path, dict(hf.state_dict())))
    pixels = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).remainder(251).to(torch.uint8)
    assert relative(got(pixels)[0], want(pixels)[0]) < 1e-6


@torch.inference_mode()
def test_a_checkpoint_without_layer_scale_is_one_of_ones(pair, tmp_path):
    _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    ones = {n: torch.ones_like(t) if n.endswith("lambda1") else t for n, t in tensors.items()}
    none = {n: t for n, t in tensors.items() if not n.endswith("lambda1")}
    (tmp_path / "ones").mkdir()
    (tmp_path / "none").mkdir()
    pixels = torch.arange(3 * 32 * 32).view(1, 3, 32, 32).remainder(253).to(torch.uint8)
    found = [load(rewritten(folder, tmp_path / n, t))(pixels)[0] for n, t in (("ones", ones), ("none", none))]
    assert torch.equal(*found)
    assert relative(found[0], load(folder)(pixels)[0]) > 1e-3


@pytest.mark.parametrize(
    "lost", ["blocks.1.attn.qkv.weight", "patch_generator.pos_embed", "blocks.0.layer_scale2.lambda1"]
)
def test_a_missing_tensor_is_an_error(pair, tmp_path, lost):
    _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"radio_model.model.{lost}"]
    with pytest.raises(CorruptCheckpoint, match="missing"):
        load(rewritten(folder, tmp_path, tensors))


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_swiglu_ffn", True), ("qkv_bias", False), ("video_temporal_patch_size", 2), ("image_size", 33)],
)
def test_what_is_not_computed_is_refused_by_name(pair, key, value):
    config = json.loads((pair[1] / "config.json").read_text()) | {key: value}
    with pytest.raises(UnsupportedModel, match=key):
        RadioConfig.from_hf(ConfigReader(config), [])


@pytest.mark.parametrize("which", ["released", "in memory"])
@torch.inference_mode()
def test_folding_scales_leaves_the_tower_as_it_was(pair, tmp_path, which):
    """Also where q, k and v are one tensor, of which the values are the last third."""
    hf, folder = pair
    tower = load(folder if which == "released" else rewritten(folder, tmp_path, dict(hf.state_dict())))
    pixels = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).remainder(241).to(torch.uint8)
    before = tower(pixels)
    rng = torch.Generator().manual_seed(3)
    for layer in tower.blocks:
        for group in layer.scale_groups():
            if group.previous is None:
                continue
            layers = list(group.layers.values())
            scales = 4 ** (2 * torch.rand(layers[0].in_features, generator=rng) - 1)
            fold_scales(group.previous, layers, scales, rows=group.rows, heads=group.heads, name=group.name)
    assert len(tower.layer(0).self_attn.qkv_proj.parts) == (0 if which == "released" else 3)
    for now, then in zip(tower(pixels), before, strict=True):
        assert relative(now, then) < 2e-5


@torch.inference_mode()
def test_the_layers_one_by_one_are_the_tower(pair):
    """What the quantiser does with it."""
    tower = load(pair[1])
    tiles = torch.arange(3 * 3 * 32 * 32).view(3, 3, 32, 32).remainder(251).to(torch.uint8)
    media = [VisualInputs("image", tiles, (), None)]  # type: ignore[arg-type]
    (batch,) = tower.batches(media, 2)
    hidden = batch.hidden
    for i, layer in enumerate(tower.blocks):
        hidden = batch.run(layer, i, hidden)
    prefix = SHAPE["num_cls_tokens"] + SHAPE["num_registers"]
    assert relative(hidden[:, prefix:], tower(tiles[:2])[0]) < 1e-6
