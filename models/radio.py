"""The RADIO vision tower: several summary tokens and registers in front of the patches, positions for any grid.

Source: Ranzinger et al., arXiv 2312.06709; layout of transformers' RadioModel (nvidia/C-RADIOv4-H).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedModel
from ..quant.linear import Linear
from .blocks import ACTIVATIONS
from .checkpoint import ConfigReader
from .clip import MAX_LAYERS, ClipConfig, ClipLayer, TileTower, TowerLayers
from .siglip import PixelScale


@dataclass(frozen=True)
class RadioConfig:
    """Sizes of the tower, and how its checkpoint is written."""

    layers: ClipConfig  # of the layers, the picture and the patches
    table_side: int  # patches of a side that the position table is made for
    num_summary: int  # summary (class) tokens: they come first
    num_registers: int  # tokens behind them that stand for nothing
    fused_qkv: bool  # q, k and v are one tensor in the checkpoint
    layer_scale: bool  # the checkpoint has factors behind attention and MLP

    @staticmethod
    def from_hf(vision: ConfigReader, tensors: Iterable[str]) -> RadioConfig:
        """Reads a Hugging Face RADIO config and the names of the tensors; omitted keys take the class defaults."""
        vision.get_str("model_type", default="radio", choices=("radio",))
        hidden = vision.get_int("hidden_size", default=1280, low=1, high=65536)
        heads = vision.get_int("num_attention_heads", default=16, low=1, high=1024)
        size = vision.get_int("image_size", default=224, low=1, high=16384)
        patch = vision.get_int("patch_size", default=16, low=1, high=1024)
        if hidden % heads or size % patch:
            raise UnsupportedModel(
                f"{vision.file}: expected hidden_size a multiple of num_attention_heads and image_size of patch_size, "
                f"got {hidden}, {heads}, {size}, {patch}"
            )
        for key, wanted in (("use_swiglu_ffn", False), ("qkv_bias", True)):
            if vision.get_bool(key, default=wanted) is not wanted:
                raise UnsupportedModel(f"{vision.file}: {key}: expected {wanted}, the other form is not computed here")
        if vision.get_int("video_temporal_patch_size", default=None, none_ok=True) is not None:
            raise UnsupportedModel(f"{vision.file}: video_temporal_patch_size: expected null, got a number")
        if vision.get_int("num_channels", default=3) != 3:
            vision.fail("num_channels", "3")
        names = list(tensors)
        return RadioConfig(
            layers=ClipConfig(
                hidden_size=hidden,
                intermediate_size=int(hidden * vision.get_float("mlp_ratio", default=4.0, low=0.1, high=64.0)),
                num_layers=vision.get_int("num_hidden_layers", default=32, low=1, high=MAX_LAYERS),
                num_heads=heads,
                image_size=size,
                patch_size=patch,
                hidden_act=vision.get_str("hidden_act", default="gelu", choices=tuple(ACTIVATIONS)),
                layer_norm_eps=vision.get_float("layer_norm_eps", default=1e-6, low=0.0),
            ),
            table_side=vision.get_int("max_img_size", default=2048, low=patch, high=1 << 16) // patch,
            num_summary=vision.get_int("num_cls_tokens", default=3, low=1, high=256),
            num_registers=vision.get_int("num_registers", default=7, low=0, high=256),
            fused_qkv=any(".attn.qkv." in name for name in names),
            layer_scale=any(name.endswith(".layer_scale1.lambda1") for name in names),
        )

    @property
    def hidden_size(self) -> int:
        return self.layers.hidden_size

    @property
    def image_size(self) -> int:
        return self.layers.image_size

    @property
    def grid(self) -> int:
        """Patches of a side of a tile."""
        return self.layers.grid

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches."""
        return self.num_summary + self.num_registers


class _Conditioner(nn.Module):
    """Normalises pixels of 0..1 by numbers that are part of the checkpoint; in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_mean = nn.Parameter(torch.empty(3, 1, 1), requires_grad=False)
        self.norm_std = nn.Parameter(torch.empty(3, 1, 1), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.norm_mean.float()) / self.norm_std.float()


class _Embeddings(nn.Module):
    def __init__(self, config: RadioConfig) -> None:
        super().__init__()
        self.config = config
        hidden, patch = config.hidden_size, config.layers.patch_size
        self.cls_register_token = nn.Parameter(torch.empty(config.num_prefix, hidden), requires_grad=False)
        self.patch_projection = Linear(3 * patch * patch, hidden)
        self.position_embedding = nn.Parameter(torch.empty(1, config.table_side**2, hidden), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W), sides multiples of the patch -> (B, prefix + patches, hidden_size)."""
        patch = self.config.layers.patch_size
        B, _, H, W = pixels.shape
        rows, cols = H // patch, W // patch
        patches = pixels.view(B, 3, rows, patch, cols, patch).permute(0, 2, 4, 1, 3, 5)
        x = self.patch_projection(patches.reshape(B, rows * cols, 3 * patch * patch))
        prefix = self.cls_register_token.expand(B, -1, -1)
        return torch.cat([prefix, x + self._positions(rows, cols).to(x.dtype)], dim=1)

    def _positions(self, rows: int, cols: int) -> Tensor:
        """(rows * cols, hidden_size) float32: the table scaled to the longer side, then cut."""
        side, longest = self.config.table_side, max(rows, cols)
        table = self.position_embedding.view(1, side, side, -1).permute(0, 3, 1, 2).float()
        table = F.interpolate(table, size=(longest, longest), mode="bilinear", align_corners=False)
        return table[0, :, :rows, :cols].flatten(1).transpose(0, 1)


class _LayerScale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class RadioLayer(ClipLayer):
    """One layer of the tower; names as in CLIP."""

    def __init__(self, config: RadioConfig) -> None:
        super().__init__(config.layers)
        self.num_summary = config.num_summary
        size = config.hidden_size
        if config.fused_qkv:
            self.self_attn.qkv_proj = Linear(size, 3 * size, bias=True)
        self.layer_scale1 = _LayerScale(size) if config.layer_scale else nn.Identity()
        self.layer_scale2 = _LayerScale(size) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, *, score: bool, with_keys: bool = False) -> tuple[Tensor, Tensor | None]:
        """x (B, S, hidden) -> the layer's output and, if asked, what the raters attend to, (B, S) float32, or marks."""
        attended, scores = self.attend(x, score=score, with_keys=with_keys)
        x = x + self.layer_scale1(attended)
        return x + self.layer_scale2(self.mlp(x, self.layer_norm2)), scores

    def raters(self, q: Tensor) -> Tensor:
        """The rows of the summary tokens, all of them; registers are no summary (arXiv 2510.17777, section 3.1)."""
        return q[:, :, : self.num_summary]


class RadioTower(TileTower):
    """Pictures in, features and saliency out. All layers are run; there is no norm behind the last."""

    def __init__(self, config: RadioConfig, scale: PixelScale) -> None:
        super().__init__()
        self.config = config
        self.scale = scale
        self.input_conditioner = _Conditioner()
        self.embeddings = _Embeddings(config)
        self.encoder = TowerLayers(RadioLayer(config) for _ in range(config.layers.num_layers))
        self.num_prefix = config.num_prefix

    @property
    def hidden_size(self) -> int:
        """Of a feature."""
        return self.config.hidden_size

    @property
    def grid(self) -> int:
        """Patches of a side of a tile."""
        return self.config.grid

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) uint8 -> what enters the first layer, (B, prefix + patches, hidden_size)."""
        weight = self.embeddings.cls_register_token
        conditioned = self.input_conditioner(self.scale(pixels.to(weight.device)))
        return self.embeddings(conditioned.to(weight.dtype))


_RENAMED = {
    # The released files and what transformers writes.
    "model.patch_generator.cls_token.token": "embeddings.cls_register_token",
    "model.patch_generator.embedder.weight": "embeddings.patch_projection.weight",
    "model.patch_generator.pos_embed": "embeddings.position_embedding",
    "summary_idxs": None,  # which summary tokens make a picture's embedding, which nobody asks for here
}
_RENAMED_PARTS = {
    "norm1": ["layer_norm1"], "norm2": ["layer_norm2"],
    "attn.qkv": ["self_attn", "qkv_proj"], "attn.proj": ["self_attn", "out_proj"],
    "attention.q_proj": ["self_attn", "q_proj"], "attention.k_proj": ["self_attn", "k_proj"],
    "attention.v_proj": ["self_attn", "v_proj"], "attention.o_proj": ["self_attn", "out_proj"],
}  # fmt: skip


def rename_radio(name: str) -> str | None:
    """Name in a RADIO folder -> the tower's, for the released scheme and for the names in memory; None: not needed.

    released:   radio_model.model.blocks.0.attn.qkv.weight
    in memory:  encoder.layer.0.attention.q_proj.weight
    """
    name = name.removeprefix("radio_model.")
    if name in _RENAMED:
        return _RENAMED[name]
    parts = name.split(".")
    for prefix in (["model", "blocks"], ["encoder", "layer"]):
        if parts[:2] == prefix and len(parts) > 3:
            number, inner = parts[2], parts[3:]
            for length in (2, 1):
                known = _RENAMED_PARTS.get(".".join(inner[:length]))
                if known is not None:
                    inner = known + inner[length:]
                    break
            return ".".join(["encoder", "layers", number, *inner])
    return name
