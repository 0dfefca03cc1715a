"""The SigLIP vision tower, up to the layer whose output is used.

Its layers are CLIP's; it has no summary token, a bias in the patch convolution, and no norm in front.
Source: Zhai et al., arXiv 2303.15343; layout of transformers' SiglipVisionModel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from .blocks import ACTIVATIONS, empty_embedding
from .checkpoint import ConfigReader
from .clip import MAX_LAYERS, ClipConfig, ClipLayer, TileTower, TowerLayers


@dataclass(frozen=True)
class PixelScale:
    """From bytes to what a tower was trained on: (byte * factor - mean) / std, per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    factor: float = 1 / 255

    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) uint8 -> the same shape in float32, rounded where transformers rounds."""
        values = (torch.arange(256, dtype=torch.float64) * self.factor).float()
        table = (values - torch.tensor(self.mean)[:, None]) / torch.tensor(self.std)[:, None]  # (3, 256)
        offsets = torch.arange(3, device=pixels.device)[:, None, None] * 256
        return table.flatten().to(pixels.device)[pixels.long() + offsets]


def siglip_config(vision: ConfigReader) -> ClipConfig:
    """Reads a Hugging Face SigLIP vision config; omitted keys take the class defaults."""
    vision.get_str("model_type", default="siglip_vision_model", choices=("siglip_vision_model",))
    config = ClipConfig(
        hidden_size=vision.get_int("hidden_size", default=768, low=1, high=65536),
        intermediate_size=vision.get_int("intermediate_size", default=3072, low=1, high=1 << 20),
        num_layers=vision.get_int("num_hidden_layers", default=12, low=1, high=MAX_LAYERS),
        num_heads=vision.get_int("num_attention_heads", default=12, low=1, high=1024),
        image_size=vision.get_int("image_size", default=224, low=1, high=16384),
        patch_size=vision.get_int("patch_size", default=16, low=1, high=1024),
        hidden_act=vision.get_str("hidden_act", default="gelu_pytorch_tanh", choices=tuple(ACTIVATIONS)),
        layer_norm_eps=vision.get_float("layer_norm_eps", default=1e-6, low=0.0),
    )
    if vision.get_int("num_channels", default=3) != 3:
        vision.fail("num_channels", "3")
    if config.hidden_size % config.num_heads or config.image_size < config.patch_size:
        raise UnsupportedModel(
            f"{vision.file}: expected hidden_size a multiple of num_attention_heads and image_size >= patch_size, "
            f"got {config.hidden_size}, {config.num_heads}, {config.image_size}, {config.patch_size}"
        )
    return config


class _Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        # An image size that patches do not divide (384 by 14) leaves pixels at the right and bottom unseen.
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = empty_embedding(config.grid**2, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> (B, patches, hidden_size)."""
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipLayer(ClipLayer):
    """One layer of the tower."""

    def raters(self, q: Tensor) -> Tensor:
        """Every row: no token stands for the whole picture (arXiv 2510.17777, section 3.1)."""
        return q


class SiglipTower(TileTower):
    """Pictures in, features and saliency out. Holds only the layers that are used."""

    tiles_per_batch = 4  # all rows rate all columns, so a tile takes more than one of a tower with a summary token

    def __init__(self, config: ClipConfig, feature_layer: int, scale: PixelScale) -> None:
        super().__init__()
        self.config = config
        self.scale = scale
        self.embeddings = _Embeddings(config)
        self.encoder = TowerLayers(SiglipLayer(config) for _ in range(config.layers_run(feature_layer)))

    @property
    def hidden_size(self) -> int:
        """Of a feature."""
        return self.config.hidden_size

    @property
    def grid(self) -> int:
        """Patches of a side."""
        return self.config.grid

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) uint8 -> what enters the first layer, (B, patches, hidden_size)."""
        weight = self.embeddings.position_embedding.weight
        return self.embeddings(self.scale(pixels.to(weight.device)).to(weight.dtype))


def rename_siglip(name: str, config: ClipConfig, layers_used: int) -> str | None:
    """Name in a SigLIP folder -> the tower's, for the schemes with and without `vision_model.`; None: not needed."""
    parts = name.split(".")
    if parts[0] == "vision_model":
        parts = parts[1:]
    if parts[-2:] == ["embeddings", "position_ids"] or parts[0] in ("head", "post_layernorm"):
        return None
    number = parts[2] if parts[:2] == ["encoder", "layers"] and len(parts) > 2 else ""
    if number.isdigit() and layers_used <= int(number) < config.num_layers:
        return None
    return ".".join(parts)
