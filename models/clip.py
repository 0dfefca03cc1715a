"""The CLIP vision tower, up to the layer whose output is used.

Source: Radford et al., arXiv 2103.00020; layout of transformers' CLIPVisionModel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedModel
from ..kernels.saliency import saliency
from ..quant.awq import HeadGroups
from ..quant.linear import Linear
from ..quant.scale_group import ScaledBlock, ScaleGroup
from .blocks import ACTIVATIONS, empty_embedding
from .checkpoint import ConfigReader
from .interface import VisualInputs
from .vision_tower import TILES_PER_BATCH, TowerBatch, tiles_in_turn, with_mean_keys

MAX_LAYERS = 256


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the tower; `num_layers` counts the layers of the checkpoint, used or not."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int  # pixels of a side
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    @staticmethod
    def from_hf(vision: ConfigReader) -> ClipConfig:
        """Reads a Hugging Face CLIP vision config; omitted keys take the class defaults."""
        vision.get_str("model_type", default="clip_vision_model", choices=("clip_vision_model",))
        config = ClipConfig(
            hidden_size=vision.get_int("hidden_size", default=768, low=1, high=65536),
            intermediate_size=vision.get_int("intermediate_size", default=3072, low=1, high=1 << 20),
            num_layers=vision.get_int("num_hidden_layers", default=12, low=1, high=MAX_LAYERS),
            num_heads=vision.get_int("num_attention_heads", default=12, low=1, high=1024),
            image_size=vision.get_int("image_size", default=224, low=1, high=16384),
            patch_size=vision.get_int("patch_size", default=32, low=1, high=1024),
            hidden_act=vision.get_str("hidden_act", default="quick_gelu", choices=tuple(ACTIVATIONS)),
            layer_norm_eps=vision.get_float("layer_norm_eps", default=1e-5, low=0.0),
        )
        if config.hidden_size % config.num_heads or config.image_size < config.patch_size:
            raise UnsupportedModel(
                f"vision config: expected hidden_size a multiple of num_attention_heads and image_size >= patch_size, "
                f"got {config.hidden_size}, {config.num_heads}, {config.image_size}, {config.patch_size}"
            )
        return config

    @property
    def grid(self) -> int:
        """Patches of a side."""
        return self.image_size // self.patch_size

    def layers_run(self, feature_layer: int) -> int:
        """How many layers make hidden_states[feature_layer], whose entry 0 is the embedding."""
        layers = feature_layer if feature_layer >= 0 else self.num_layers + 1 + feature_layer
        if not 1 <= layers <= self.num_layers:
            raise UnsupportedModel(f"vision_feature_layer: expected a layer of {self.num_layers}, got {feature_layer}")
        return layers


class _Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = empty_embedding(config.grid**2 + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> (B, 1 + patches, hidden_size), the summary token first."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        summary = self.class_embedding.expand(pixels.shape[0], 1, -1)
        return torch.cat([summary, patches], dim=1) + self.position_embedding.weight


class _Attention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        size = config.hidden_size
        self.qkv_proj = Linear(size, {"q_proj": size, "k_proj": size, "v_proj": size}, bias=True)
        self.out_proj = Linear(size, size, bias=True)


class _MLP(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.act = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        return self.fc2(self.fc1.fused(x, norm=norm, act=self.act))


class ClipLayer(ScaledBlock):
    """One layer of the tower."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, *, score: bool, with_keys: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B, S, hidden) -> the layer's output and, if asked, what the raters attend to, (B, S) float32.

        With keys the scores are marks, (B, S, 1 + head_dim): `with_mean_keys`.
        """
        attended, scores = self.attend(x, score=score, with_keys=with_keys)
        x = x + attended
        return x + self.mlp(x, self.layer_norm2), scores

    def attend(self, x: Tensor, *, score: bool, with_keys: bool = False) -> tuple[Tensor, Tensor | None]:
        """What attention adds to x (B, S, hidden), and the scores as in `forward`."""
        B, S, size = x.shape
        qkv = self.self_attn.qkv_proj.fused(x, norm=self.layer_norm1).reshape(B, S, 3, self.self_attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, head_dim)
        scores = saliency(self.raters(q), k) if score else None
        if with_keys and scores is not None:
            scores = with_mean_keys(scores, k)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, size)
        return self.self_attn.out_proj(attended), scores

    def raters(self, q: Tensor) -> Tensor:
        """The rows of q (B, heads, S, head_dim) whose attention is the saliency: the summary token's."""
        return q[:, :, :1]

    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """Norms feed qkv and fc1, values reach out_proj as weighted means; before fc2 stands an activation."""
        attn, mlp = self.self_attn, self.mlp
        size = attn.out_proj.in_features
        heads = HeadGroups(attn.num_heads, attn.num_heads, size // attn.num_heads)
        v = attn.qkv_proj.parts.get("v_proj", slice(2 * size, 3 * size))  # without parts: one tensor in the checkpoint
        return (
            ScaleGroup({"self_attn.qkv_proj": attn.qkv_proj}, self.layer_norm1),
            ScaleGroup({"self_attn.out_proj": attn.out_proj}, attn.qkv_proj, rows=v, heads=heads),
            ScaleGroup({"mlp.fc1": mlp.fc1}, self.layer_norm2),
            ScaleGroup({"mlp.fc2": mlp.fc2}, None, unscaled="an activation stands before it"),
        )


class TowerLayers(nn.Module):
    """The layers that are run, under the name that checkpoints have for them."""

    def __init__(self, layers: Iterable[ClipLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TileTower(nn.Module):
    """A tower of such layers over tiles of one size: what CLIP, SigLIP and RADIO share."""

    encoder: TowerLayers
    num_prefix = 0  # tokens in front of the patches
    tiles_per_batch = TILES_PER_BATCH  # of the quantiser

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> what enters the first layer, (B, prefix + patches, hidden_size)."""
        raise NotImplementedError

    def layer(self, index: int) -> ClipLayer:
        """The layer `index`, from 0."""
        layer = self.encoder.layers[index]
        assert isinstance(layer, ClipLayer)
        return layer

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    def batches(self, media: Sequence[VisualInputs], limit: int) -> list[TowerBatch]:
        """At most `limit` tiles of the media, the first of each before the second of any."""
        tiles = tiles_in_turn(media, limit)
        return [TowerBatch(self.embed(some), _run_layer) for some in tiles.split(self.tiles_per_batch)]

    def forward(self, pixels: Tensor, *, with_keys: bool = False) -> tuple[Tensor, Tensor]:
        """Encodes pictures.

        pixels (B, 3, S, S) as `embed` takes them. Returns features (B, patches, hidden_size) and saliency (B, patches)
        float32: what the raters' rows (`ClipLayer.raters`) give each patch in the last layer that is run, mean over
        heads and rows; columns of the prefix stay in the denominator (arXiv 2510.17777, section 3.1). With keys the
        second are marks, (B, patches, 1 + head_dim): saliency, then the head-mean key.
        """
        x = self.embed(pixels)
        scores = None
        last = len(self.encoder.layers) - 1
        for i, layer in enumerate(self.encoder.layers):
            x, scores = layer(x, score=i == last, with_keys=with_keys)
        assert scores is not None
        return x[:, self.num_prefix :], scores[:, self.num_prefix :]


class ClipTower(TileTower):
    """Patches in, features and saliency out; the summary token rates. Holds only the layers that are used."""

    num_prefix = 1

    def __init__(self, config: ClipConfig, feature_layer: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # spelled so in every checkpoint
        self.encoder = TowerLayers(ClipLayer(config) for _ in range(config.layers_run(feature_layer)))

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S), normalised -> what enters the first layer, (B, 1 + patches, hidden_size)."""
        weight = self.pre_layrnorm.weight
        return self.pre_layrnorm(self.embeddings(pixels.to(weight.device, weight.dtype)))


def _run_layer(layer: nn.Module, _: int, x: Tensor) -> Tensor:
    out: Tensor = layer(x, score=False)[0]
    return out
