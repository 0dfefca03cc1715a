"""The vision towers of Qwen2-VL and Qwen2.5-VL: pictures of any size, rotary positions, no summary token.

The second generation differs by config: RMS norms, a gated MLP, and attention within windows in most layers.
Sources: arXiv 2409.12191 and arXiv 2502.13923; layout of transformers' Qwen2VLForConditionalGeneration and
Qwen2_5_VLForConditionalGeneration.

Attention never crosses a frame, so frames are a batch. Sizes: F frames (temporal patches) of one size, S patches of
a frame, S / merge^2 tokens of it. The patches of a token stand next to each other, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedModel
from ..kernels.attention import attention
from ..kernels.rope import rope
from ..kernels.saliency import saliency
from ..kernels.silu_mul import silu_mul
from ..quant.awq import HeadGroups
from ..quant.linear import Linear
from ..quant.scale_group import ScaledBlock, ScaleGroup
from .blocks import ACTIVATIONS, RMSNorm
from .checkpoint import ConfigReader
from .vision_tower import with_mean_keys

MAX_LAYERS = 256
_CHANNELS = 3
_NORM_EPS = 1e-6  # no config states it
_ROWS_PER_MLP = 4096  # a picture of 61,204 patches would need 0.8 GB for the gate in bfloat16


@dataclass(frozen=True)
class QwenVitConfig:
    """Sizes of the tower."""

    hidden_size: int  # of the tower
    out_hidden_size: int  # of the merged tokens
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int  # pixels of a side
    temporal_patch_size: int  # frames
    merge_size: int  # patches of a token's side
    hidden_act: str
    gated: bool  # Qwen2.5-VL: RMS norms and gated MLPs
    window_size: int | None  # pixels of a window's side; None: every layer sees the frame
    full_layers: frozenset[int]  # layers that see the whole frame
    rope_theta: float

    @staticmethod
    def from_hf(vision: ConfigReader, *, gated: bool) -> QwenVitConfig:
        """Reads a Hugging Face vision config, `gated` for the second generation; omitted keys take class defaults."""
        layers = vision.get_int("depth", default=32, low=1, high=MAX_LAYERS)
        rotary = vision.sub("rope_parameters", required=False)
        rotary.get_str("rope_type", default="axial", choices=("axial", "default"))
        vision.get_int(("in_channels", "in_chans"), default=_CHANNELS, low=_CHANNELS, high=_CHANNELS)
        config = QwenVitConfig(
            num_layers=layers,
            num_heads=vision.get_int("num_heads", default=16, low=1, high=1024),
            patch_size=vision.get_int("patch_size", default=14, low=1, high=1024),
            temporal_patch_size=vision.get_int("temporal_patch_size", default=2, low=1, high=64),
            merge_size=vision.get_int("spatial_merge_size", default=2, low=1, high=64),
            gated=gated,
            rope_theta=rotary.get_float("rope_theta", default=10000.0, low=1.0),
            **(_second_generation(vision, layers) if gated else _first_generation(vision, layers)),
        )
        if config.hidden_size % (4 * config.num_heads):
            raise UnsupportedModel(
                f"vision config: expected a width of num_heads times a multiple of 4, got {config.hidden_size} and "
                f"{config.num_heads} heads"
            )
        if config.window_size is not None and config.window_side < 1:
            raise UnsupportedModel(f"vision config: window_size: expected at least one token, got {config.window_size}")
        return config

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def window_side(self) -> int:
        """Tokens of a window's side."""
        assert self.window_size is not None
        return self.window_size // self.merge_size // self.patch_size

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of one patch."""
        return _CHANNELS, self.temporal_patch_size, self.patch_size, self.patch_size


def _first_generation(vision: ConfigReader, num_layers: int) -> dict[str, Any]:
    """Here `hidden_size` is the width of what comes out."""
    width = vision.get_int("embed_dim", default=1280, low=1, high=65536)
    return {
        "hidden_size": width,
        "out_hidden_size": vision.get_int("hidden_size", default=3584, low=1, high=65536),
        "intermediate_size": int(width * vision.get_float("mlp_ratio", default=4, low=1 / 65536, high=1024)),
        "hidden_act": vision.get_str("hidden_act", default="quick_gelu", choices=tuple(ACTIVATIONS)),
        "window_size": None,
        "full_layers": frozenset(range(num_layers)),
    }


def _second_generation(vision: ConfigReader, num_layers: int) -> dict[str, Any]:
    """Raises UnsupportedModel where no layer sees the frame: saliency is read off the last that does."""
    listed = vision.get_ints("fullatt_block_indexes", default=(7, 15, 23, 31), high=MAX_LAYERS)
    full_layers = frozenset(index for index in listed if index < num_layers)
    if not full_layers:
        raise UnsupportedModel(f"fullatt_block_indexes: expected one of the {num_layers} layers, got {listed}")
    return {
        "hidden_size": vision.get_int("hidden_size", default=3584, low=1, high=65536),
        "out_hidden_size": vision.get_int("out_hidden_size", default=3584, low=1, high=65536),
        "intermediate_size": vision.get_int("intermediate_size", default=3420, low=1, high=1 << 20),
        "hidden_act": vision.get_str("hidden_act", default="silu", choices=("silu",)),
        "window_size": vision.get_int("window_size", default=112, low=1, high=1 << 20),
        "full_layers": full_layers,
    }


def windows_of(rows: int, cols: int, side: int) -> list[Tensor]:
    """The windows of a grid of tokens, row by row: each (tokens,) int64 in reading order, smaller at right and bottom.

    One after the other they are transformers' `window_index`.
    """
    tokens = torch.arange(rows * cols).view(rows, cols)
    corners = ((y, x) for y in range(0, rows, side) for x in range(0, cols, side))
    return [tokens[y : y + side, x : x + side].flatten() for y, x in corners]


@dataclass(frozen=True)
class FrameLayout:
    """How the tower holds the S patches of a frame, the same for all frames of one size."""

    cos: Tensor  # (S, head_dim / 2) float32: row and column of each patch
    sin: Tensor
    tokens: Tensor  # (S / merge^2,) int64: which token in reading order stands at each place
    places: Tensor  # (S / merge^2,) int64: and the other way round
    windows: tuple[tuple[int, int], ...]  # (how many, patches in each), place by place; empty where there are none

    @staticmethod
    def of(config: QwenVitConfig, rows: int, cols: int, device: torch.device) -> FrameLayout:
        """The layout of a grid of rows x cols patches, both multiples of the merge size."""
        merge = config.merge_size
        high, wide = rows // merge, cols // merge
        token = torch.arange(high * wide)
        windows: list[tuple[int, int]] = []
        if config.window_size is not None:
            # Windows of one size stand together, so that each size is one batch of attention.
            parts = sorted(windows_of(high, wide, config.window_side), key=len, reverse=True)
            token = torch.cat(parts)
            sizes = [len(part) for part in parts]
            windows = [(sizes.count(size), size * merge**2) for size in dict.fromkeys(sizes)]
        inner = torch.arange(merge)
        y = ((token // wide)[:, None, None] * merge + inner[:, None]).expand(-1, merge, merge)
        x = ((token % wide)[:, None, None] * merge + inner).expand(-1, merge, merge)
        size = config.head_dim // 2  # half of the pairs turn by the row, half by the column
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle = torch.cat([axis.reshape(-1, 1) * frequencies for axis in (y, x)], dim=1)
        angle, token = angle.to(device), token.to(device)
        return FrameLayout(angle.cos(), angle.sin(), token, token.argsort(), tuple(windows))

    def place(self, x: Tensor) -> Tensor:
        """x (F, S, ...) from reading order of the tokens into the tower's."""
        return x.unflatten(1, (len(self.tokens), -1))[:, self.tokens].flatten(1, 2)

    def read(self, x: Tensor) -> Tensor:
        """x (F, tokens, ...) from the tower's order into reading order."""
        return x[:, self.places]


class _PatchProjection(nn.Module):
    """A convolution whose stride is its size: a matrix over whole patches. Holds the convolution's weight."""

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, *config.patch_shape), requires_grad=False)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1))


def _norm(config: QwenVitConfig) -> nn.Module:
    if config.gated:
        return RMSNorm(config.hidden_size, _NORM_EPS)
    return nn.LayerNorm(config.hidden_size, _NORM_EPS)


class _Attention(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)  # one matrix in every checkpoint
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True)


class _MLP(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def scale_groups(self, norm: nn.Module) -> tuple[ScaleGroup, ...]:
        return (
            ScaleGroup({"mlp.fc1": self.fc1}, norm),
            ScaleGroup({"mlp.fc2": self.fc2}, None, unscaled="an activation stands before it"),
        )


class _GatedMLP(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, {"gate_proj": size, "up_proj": size}, bias=True)
        self.down_proj = Linear(size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(x)))

    def scale_groups(self, norm: nn.Module) -> tuple[ScaleGroup, ...]:
        up = self.gate_up_proj.parts["up_proj"]
        return (
            ScaleGroup({"mlp.gate_up_proj": self.gate_up_proj}, norm),
            ScaleGroup({"mlp.down_proj": self.down_proj}, self.gate_up_proj, rows=up),
        )


class QwenVitLayer(ScaledBlock):
    """One layer of the tower."""

    def __init__(self, config: QwenVitConfig, index: int) -> None:
        super().__init__()
        self.sees_frame = index in config.full_layers
        self.norm1 = _norm(config)
        self.norm2 = _norm(config)
        self.attn = _Attention(config)
        self.mlp = _GatedMLP(config) if config.gated else _MLP(config)

    def forward(
        self, x: Tensor, layout: FrameLayout, *, score: bool, with_keys: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (F, S, hidden) in the layout's order -> the layer's output and, if asked, what each patch receives.

        That is the mean over heads and all rows of the frame, (F, S) float32; only for a layer that sees the frame.
        With keys they are marks, (F, S, 1 + head_dim): `with_mean_keys`.
        """
        attended, scores = self._attend(x, layout, score=score, with_keys=with_keys)
        x = x + self.attn.proj(attended)
        rows = x.flatten(0, 1)
        added = torch.cat([self.mlp(self.norm2(part)) for part in rows.split(_ROWS_PER_MLP)])
        return (rows + added).view(x.shape), scores

    def _attend(self, x: Tensor, layout: FrameLayout, *, score: bool, with_keys: bool) -> tuple[Tensor, Tensor | None]:
        """What every patch attends to, (F, S, hidden), and the scores; queries, keys and values go when it returns."""
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (F, heads, S, head_dim)
        q, k = _rotated(q, layout), _rotated(k, layout)
        scores = None
        if score:
            assert self.sees_frame
            attended, scores = _scored_attention(q, k, v)
            if with_keys:
                scores = with_mean_keys(scores, k)
        elif self.sees_frame:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            attended = _windowed_attention(q, k, v, layout.windows)
        return attended.transpose(1, 2).flatten(2), scores

    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """Norms feed qkv and the MLP, values reach proj as weighted means; silu(gate) * up is linear in up."""
        attn, size = self.attn, self.attn.proj.in_features
        heads = HeadGroups(attn.num_heads, attn.num_heads, size // attn.num_heads)
        return (
            ScaleGroup({"attn.qkv": attn.qkv}, self.norm1),
            ScaleGroup({"attn.proj": attn.proj}, attn.qkv, rows=slice(2 * size, 3 * size), heads=heads),
            *self.mlp.scale_groups(self.norm2),
        )


def _rotated(x: Tensor, layout: FrameLayout) -> Tensor:
    """Turned by row and column in float32, as the models were trained: (F, heads, S, head_dim) -> the same."""
    return rope(x.float().flatten(0, 1), layout.cos, layout.sin).view(x.shape).to(x.dtype)


def _windowed_attention(q: Tensor, k: Tensor, v: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
    """Attention within windows: all (F, heads, S, head_dim), S the windows one after the other."""
    parts, start = [], 0
    for count, patches in windows:
        rows = slice(start, start + count * patches)
        start = rows.stop
        # each window a picture of its own: (F * count, heads, patches, head_dim)
        inside = (t[:, :, rows].unflatten(2, (count, patches)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(*inside).unflatten(0, (-1, count))
        parts.append(attended.transpose(1, 2).flatten(2, 3))
    return torch.cat(parts, dim=2)


def _scored_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every frame and what each of its patches receives: (F, heads, S, head_dim) and (F, S) float32."""
    attended, received = [], []
    for frame in zip(q, k, v, strict=True):
        out, lse = attention(*frame, causal=False)
        attended.append(out)
        received.append(saliency(frame[0][None], frame[1][None], lse=lse[None])[0])
    return torch.stack(attended), torch.stack(received)


class _Merger(nn.Module):
    """The patches of a token side by side, through an MLP to the language model's width."""

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.joined = config.hidden_size * config.merge_size**2
        self.ln_q = _norm(config)
        self.mlp = nn.ModuleDict(  # named as in checkpoints, where the activation is number 1
            {
                "0": Linear(self.joined, self.joined, bias=True),
                "2": Linear(self.joined, config.out_hidden_size, bias=True),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (F, S, hidden) -> (F, tokens, out_hidden_size)."""
        joined = self.ln_q(x).reshape(x.shape[0], -1, self.joined)
        return self.mlp["2"](F.gelu(self.mlp["0"](joined)))


class QwenVit(nn.Module):
    """Patches in, tokens and saliency out."""

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.ModuleDict({"proj": _PatchProjection(config)})
        self.blocks = nn.ModuleList(QwenVitLayer(config, index) for index in range(config.num_layers))
        self.merger = _Merger(config)

    def layer(self, index: int) -> QwenVitLayer:
        """The layer `index`, from 0."""
        layer = self.blocks[index]
        assert isinstance(layer, QwenVitLayer)
        return layer

    @property
    def weight(self) -> Tensor:
        """One that is never quantised: device and dtype of the tower."""
        projection = self.patch_embed["proj"]
        assert isinstance(projection, _PatchProjection)
        return projection.weight

    def layout(self, rows: int, cols: int) -> FrameLayout:
        """How frames of rows x cols patches are held."""
        return FrameLayout.of(self.config, rows, cols, self.weight.device)

    def embed(self, patches: Tensor, layout: FrameLayout) -> Tensor:
        """patches (F, S, channels * frames * height * width), tokens in reading order -> what enters the first layer.

        That is (F, S, hidden_size) in the layout's order.
        """
        return layout.place(self.patch_embed["proj"](patches))

    def forward(self, patches: Tensor, layout: FrameLayout, *, with_keys: bool = False) -> tuple[Tensor, Tensor]:
        """Encodes frames of one size.

        patches (F, S, patch) in the tower's dtype, tokens in reading order. Returns features (F, tokens,
        out_hidden_size) in reading order, and saliency (F, tokens) float32: the attention that the patches of a token
        receive from all rows of their frame in the last layer that sees the frame, mean over heads, rows and patches.
        With keys the second are marks, (F, tokens, 1 + head_dim), the key as it is after rotation.
        """
        x = self.embed(patches, layout)
        scored, scores = max(self.config.full_layers), None
        for index in range(self.config.num_layers):
            x, found = self.layer(index)(x, layout, score=index == scored, with_keys=with_keys)
            scores = found if found is not None else scores
        assert scores is not None
        per_token = scores.unflatten(1, (-1, self.config.merge_size**2)).mean(2)
        return layout.read(self.merger(x)), layout.read(per_token)
