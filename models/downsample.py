"""Projectors of the VILA family: neighbouring patches are joined to one token, then a small MLP.

Module names are those of the checkpoints (`layers.1.weight`); layers without weights have none.
Source: NVlabs/VILA, llava/model/multimodal_projector/base_projector.py (the current form of all three downsamplings,
whose tokens are in reading order).
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedModel
from ..quant.linear import Linear

# Patches of a side that become one token, by projector type.
STRIDES = {
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_fix": 2,  # the name in LongVILA's training scripts
    "mlp_downsample_3x3_fix": 3,
    "linear": 1,
    "identity": 1,
}
_MLP = re.compile(r"mlp([1-9])x_gelu")


class Projector(nn.Module):
    """Patches of a square picture to tokens of the language model. `stride` is that of the joining; 1: none."""

    def __init__(self, kind: str, in_size: int, hidden_size: int) -> None:
        super().__init__()
        depth = _MLP.fullmatch(kind)
        if depth is None and kind not in STRIDES:
            known = ", ".join((*STRIDES, "mlpNx_gelu"))
            raise UnsupportedModel(f"mm_projector_type {kind!r:.60} is not supported", hint=f"supported: {known}")
        if kind == "identity" and in_size != hidden_size:
            raise UnsupportedModel(f"mm_projector_type identity: expected features of {hidden_size}, got {in_size}")
        self.stride = STRIDES.get(kind, 1)
        C, H = in_size, hidden_size
        layers: dict[str, nn.Module] = {}
        if self.stride == 2:
            layers = {"1": nn.LayerNorm(4 * C), "2": Linear(4 * C, H, bias=True), "4": Linear(H, H, bias=True)}
        elif self.stride == 3:
            layers = {
                "1": nn.LayerNorm(9 * C), "2": Linear(9 * C, 3 * C, bias=True), "4": nn.LayerNorm(3 * C),
                "5": Linear(3 * C, H, bias=True), "7": Linear(H, H, bias=True),
            }  # fmt: skip
        elif depth is not None:
            layers = {str(2 * i): Linear(C if i == 0 else H, H, bias=True) for i in range(int(depth[1]))}
        self.layers = Linear(C, H, bias=True) if kind == "linear" else nn.ModuleDict(layers)

    def tokens_of_side(self, grid: int) -> int:
        """Tokens of a side that a picture of grid x grid patches becomes."""
        return -(-grid // self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., patches, C) of square pictures in reading order -> (..., tokens, hidden_size), in reading order."""
        if isinstance(self.layers, Linear):
            return self.layers(x)
        x = space_to_depth(x, self.stride)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers.values()):
            x = layer(x)
            if isinstance(layer, nn.LayerNorm) or i == last:
                continue
            x = F.gelu(x)
        return x

    def pool(self, scores: Tensor) -> Tensor:
        """Mean over the patches that each token joins: (B, patches, C) -> (B, tokens, C). Padding does not count."""
        if self.stride == 1:
            return scores
        grid = math.isqrt(scores.shape[1])
        square = scores.transpose(1, 2).unflatten(2, (grid, grid))
        # A window that reaches over the edge is divided by the patches that are there.
        return F.avg_pool2d(square, self.stride, ceil_mode=True).flatten(2).transpose(1, 2)


def space_to_depth(x: Tensor, stride: int) -> Tensor:
    """Joins stride x stride neighbours: (B, patches, C) -> (B, tokens, stride^2 C), row by row within a token.

    A side that `stride` does not divide is padded with zeros at its end.
    """
    if stride == 1:
        return x
    B, patches, C = x.shape
    grid = math.isqrt(patches)
    assert grid * grid == patches, f"expected a square picture, got {patches} patches"
    side = -(-grid // stride)
    more = side * stride - grid
    x = F.pad(x.view(B, grid, grid, C), (0, 0, 0, more, 0, more))
    x = x.view(B, side, stride, side, stride, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(B, side * side, stride * stride * C)


def merge_tiles(x: Tensor, rows: int, cols: int) -> Tensor:
    """Tiles row by row to one picture: (rows cols, n^2, C) -> (rows n, cols n, C)."""
    side = math.isqrt(x.shape[1])
    x = x.view(rows, cols, side, side, -1).transpose(1, 2)
    return x.reshape(rows * side, cols * side, -1)


def split_tiles(x: Tensor, rows: int, cols: int) -> Tensor:
    """The way back: (rows n, cols m, C) -> (rows cols, n m, C)."""
    height, width = x.shape[0] // rows, x.shape[1] // cols
    x = x.view(rows, height, cols, width, -1).transpose(1, 2)
    return x.reshape(rows * cols, height * width, -1)


def resize_area(x: Tensor, height: int, width: int) -> Tensor:
    """Mean over the source area of each cell, in float32: (h, w, C) -> (height, width, C) in x's dtype."""
    if x.shape[:2] == (height, width):
        return x
    resized = F.interpolate(x.permute(2, 0, 1)[None].float(), size=(height, width), mode="area")
    return resized[0].permute(1, 2, 0).to(x.dtype)


def pool_blocks(x: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Mean over blocks of time, row and column: (T, h, w, C) -> (ceil(T/t), h/r, w/c, C).

    h and w are multiples of their block. The last frames of a clip that t does not divide are a shorter block.
    """
    t, r, c = sizes
    T, h, w, C = x.shape
    x = x.view(T, h // r, r, w // c, c, C).mean(dim=(2, 4)) if (r, c) != (1, 1) else x
    whole = T // t * t
    blocks = [x[:whole].view(whole // t, t, *x.shape[1:]).mean(dim=1)] if whole else []
    if whole < T:
        blocks.append(x[whole:].mean(dim=0, keepdim=True))
    return torch.cat(blocks)
