"""The SigLIP tower against `transformers` on the same weights and the same pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsevila import CorruptCheckpoint
from sparsevila.models.checkpoint import Checkpoint, ConfigReader
from sparsevila.models.clip import ClipConfig
from sparsevila.models.interface import VisualInputs
from sparsevila.models.siglip import PixelScale, SiglipLayer, SiglipTower, rename_siglip, siglip_config
from sparsevila.models.weights import load_weights
from sparsevila.quant.linear import Linear, quantised_like
from sparsevila.quant.smoothquant import quantise_int8

CPU = torch.device("cpu")
HALF = PixelScale((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# so400m's head_dim 72 and an MLP that no power of two divides; then a picture that patches do not fill.
SHAPES = {
    "wide heads": dict(hidden_size=144, intermediate_size=269, num_hidden_layers=3, num_attention_heads=2,
                       image_size=28, patch_size=7),
    "ragged": dict(hidden_size=36, intermediate_size=50, num_hidden_layers=4, num_attention_heads=3,
                   image_size=38, patch_size=7),
}  # fmt: skip


def pixels(size: int, count: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def oracle(folder: Path, shape: dict[str, int]) -> Any:
    """A random model of `transformers` with attention that is far from uniform, saved to `folder`."""
    import transformers as hf

    torch.manual_seed(0)
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**shape, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(10)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


def load(folder: Path, feature_layer: int = -2) -> SiglipTower:
    checkpoint = Checkpoint.open(folder, tokenizer=False)
    config = siglip_config(ConfigReader(checkpoint.config))
    with torch.device("meta"):
        tower = SiglipTower(config, feature_layer, HALF)

    def rename(name: str) -> str | None:
        return rename_siglip(name, config, len(tower.encoder.layers))

    load_weights(tower, checkpoint, rename, tied={}, dtype=torch.float32, device=CPU)
    return tower


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("siglip") / "tower"
    return oracle(folder, SHAPES[request.param]), folder


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("feature_layer", [-2, -3, 1])
@torch.inference_mode()
def test_features_and_saliency_equal_transformers(pair, feature_layer):
    hf, folder = pair
    tower = load(folder, feature_layer)
    picture = pixels(hf.config.image_size)
    theirs = hf(HALF(picture), output_hidden_states=True, output_attentions=True)
    features, saliency = tower(picture)
    assert relative(features, theirs.hidden_states[feature_layer]) < 1e-5
    last = len(tower.encoder.layers) - 1
    want = theirs.attentions[last].mean(dim=(1, 2))  # over heads and query rows
    assert relative(saliency, want) < 1e-5
    assert float((want.amax(1) / want.amin(1)).min()) > 1.05  # it says something


@torch.inference_mode()
def test_the_layers_one_by_one_are_the_tower(pair):
    """What the quantiser does with it."""
    hf, folder = pair
    tower = load(folder)
    media = [VisualInputs("image", pixels(hf.config.image_size, n, n), (), None) for n in (2, 1, 3)]  # type: ignore[arg-type]
    batches = tower.batches(media, 5)
    assert sum(len(batch.hidden) for batch in batches) == 5
    outputs = []
    for batch in batches:
        hidden = batch.hidden
        for i, layer in enumerate(tower.blocks):
            assert layer is tower.layer(i)
            hidden = batch.run(layer, i, hidden)
        outputs.append(hidden)
    order = [media[0].pixels[0], media[1].pixels[0], media[2].pixels[0], media[0].pixels[1], media[2].pixels[1]]
    assert relative(torch.cat(outputs), tower(torch.stack(order))[0]) < 1e-5


def test_both_naming_schemes_load(pair, tmp_path):
    _, folder = pair
    want = load(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    old = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(old, tmp_path / "model.safetensors")
    got = load(tmp_path).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("change", ["encoder.layers.0.mlp.fc1.bias", "embeddings.patch_embedding.bias"])
def test_a_missing_tensor_is_named(pair, tmp_path, change):
    _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    del tensors[change]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=change):
        load(tmp_path)


@pytest.mark.parametrize("size", [(40, 70), (38, 38), (9, 100), (300, 20)])
def test_pixels_equal_the_processor(size):
    from PIL import Image
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(rgb)
    processor = SiglipImageProcessorPil(size={"height": 38, "width": 38}, resample=Image.Resampling.BICUBIC)
    want = processor(picture, return_tensors="pt")["pixel_values"]
    squashed = np.asarray(picture.resize((38, 38), Image.Resampling.BICUBIC))
    assert torch.equal(HALF(torch.from_numpy(squashed.transpose(2, 0, 1).copy())[None]), want)


def test_a_config_that_is_not_siglip_is_refused():
    with pytest.raises(CorruptCheckpoint, match="model_type"):
        siglip_config(ConfigReader({"model_type": "clip_vision_model"}))
    with pytest.raises(CorruptCheckpoint, match="num_channels"):
        siglip_config(ConfigReader({"num_channels": 4}))


@torch.inference_mode()
def test_a_layer_of_the_real_widths_in_8_bits():
    """1152 wide, heads of 72, an MLP of 4304: every matrix against float64 on the layer's own rounded inputs."""
    torch.manual_seed(0)
    config = ClipConfig(1152, 4304, 1, 16, 448, 14, "gelu_pytorch_tanh", 1e-6)
    layer = SiglipLayer(config)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.randn(parameter.shape) * (0.1 if "norm" in name else 0.03)
    checked = []
    for name, old in [(n, m) for n, m in layer.named_modules() if isinstance(m, Linear)]:
        new = quantised_like(old, None)
        start = 0
        for part, (rows, _) in old.waits_for().items():
            weight = quantise_int8(old.weight[start : start + rows])
            new.fill(part, weight, dtype=torch.float32, device=CPU)
            old.weight.data[start : start + rows] = weight.dequantise()
            start += rows
        new.bias = old.bias
        x = torch.randn(5, old.in_features)
        scale = x.abs().amax(-1, keepdim=True) / 127
        rounded = (x / scale).round().double() * scale.double()
        want = rounded @ old.weight.double().t() + old.bias.double()
        assert relative(new(x).double(), want) < 1e-6, name
        checked.append((old.in_features, old.out_features))
    assert checked == [(1152, 3456), (1152, 1152), (1152, 4304), (4304, 1152)]
