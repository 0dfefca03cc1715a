"""Pictures of any resolution as tiles: how one is laid out, cut, and which token stands for what of it.

The picture is scaled to fit the best of some given sizes ("pinpoints"), padded, and cut into tiles of the tower's
size; the whole picture in one tile goes before them. Behind the tower the padding's patches are cut away.
Source: LLaVA-NeXT, llava-vl.github.io/blog/2024-01-30-llava-next; sizes as in transformers' LlavaNextImageProcessor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import CorruptCheckpoint
from .interface import TokenMap

Pinpoints = tuple[tuple[int, int], ...]  # (height, width) in pixels


@dataclass(frozen=True)
class Tile:
    """The square that the tower takes."""

    size: int  # pixels of a side
    patch: int  # pixels of a patch's side; what does not fill a patch at a tile's right and bottom is not seen

    @property
    def grid(self) -> int:
        """Patches of a side."""
        return self.size // self.patch


@dataclass(frozen=True)
class Anyres:
    """How one picture is laid out on the tiles. Sizes in pixels where not said otherwise."""

    tile: Tile
    height: int  # of the pinpoint
    width: int
    resized_height: int
    resized_width: int
    top: int  # first patch row and column after unpadding
    left: int
    rows: int  # patch rows and columns after unpadding
    cols: int

    @staticmethod
    def plan(height: int, width: int, pinpoints: Pinpoints, tile: Tile) -> Anyres:
        """The layout of a picture of height x width."""
        H, W = best_pinpoint(height, width, pinpoints)
        scale_h, scale_w = H / height, W / width
        if scale_w < scale_h:
            resized_h, resized_w = min(math.ceil(height * scale_w), H), W
        else:
            resized_h, resized_w = H, min(math.ceil(width * scale_h), W)
        grid_h, grid_w = H // tile.size * tile.grid, W // tile.size * tile.grid
        top = left = 0
        # Unpadding cuts the same number on both sides, from the original size (not from the resized one).
        if width / height > grid_w / grid_h:
            top = (grid_h - int(round(height * (grid_w / width), 7))) // 2
        else:
            left = (grid_w - int(round(width * (grid_h / height), 7))) // 2
        return Anyres(tile, H, W, resized_h, resized_w, top, left, grid_h - 2 * top, grid_w - 2 * left)

    @property
    def pad_top(self) -> int:
        return (self.height - self.resized_height) // 2

    @property
    def pad_left(self) -> int:
        return (self.width - self.resized_width) // 2

    @property
    def tile_cols(self) -> int:
        """Tiles of a row."""
        return self.width // self.tile.size

    def tiles(self, rgb: np.ndarray) -> list[np.ndarray]:
        """rgb (H, W, 3) uint8 -> tiles (S, S, 3) uint8: the whole picture first, then row by row."""
        size = self.tile.size
        picture = Image.fromarray(rgb)
        resized = picture.resize((self.resized_width, self.resized_height), Image.Resampling.BICUBIC)
        canvas = np.zeros((self.height, self.width, 3), dtype=np.uint8)
        rows = slice(self.pad_top, self.pad_top + self.resized_height)
        cols = slice(self.pad_left, self.pad_left + self.resized_width)
        canvas[rows, cols] = np.asarray(resized)
        whole = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        return [whole] + [
            canvas[y : y + size, x : x + size] for y in range(0, self.height, size) for x in range(0, self.width, size)
        ]

    def token_map(self, rows: int, cols: int) -> TokenMap:
        """The whole picture's patches, then `rows` x `cols` cells over the unpadded rest, each row and its newline."""
        grid = self.tile.grid
        y = (self._pixels(self.top, self.rows, rows) - self.pad_top) / self.resized_height
        x = (self._pixels(self.left, self.cols, cols) - self.pad_left) / self.resized_width
        row = torch.arange(rows).repeat_interleave(cols + 1)
        col = torch.arange(cols + 1).repeat(rows)
        newline = col == cols
        # A newline is a line of no width at the right end of its row.
        right = torch.cat([x[1:], torch.ones(1)])
        left = torch.cat([x[:-1], torch.ones(1)])
        boxes = torch.stack([y[row], left[col], y[row + 1], right[col]], dim=1).clamp(0, 1)
        base, total = grid * grid, grid * grid + len(row)
        zeros = torch.zeros(total, dtype=torch.int32)
        return TokenMap(
            media=zeros,
            frame=zeros,
            box=torch.cat([grid_boxes(grid, grid), boxes]),
            structural=torch.cat([torch.zeros(base, dtype=torch.bool), newline]),
            line=torch.cat([torch.full((base,), -1), row]).to(torch.int32),
        )

    def _pixels(self, first: int, patches: int, cells: int) -> Tensor:
        """Where `cells` equal cells over some patches begin and end on the canvas, (cells + 1,) float32."""
        edges = first + torch.arange(cells + 1) * (patches / max(cells, 1))
        tile = (edges / self.tile.grid).floor()
        return tile * self.tile.size + (edges - tile * self.tile.grid) * self.tile.patch


def best_pinpoint(height: int, width: int, pinpoints: Pinpoints) -> tuple[int, int]:
    """The (H, W) that shows the most source pixels; on a tie the one that wastes the least."""

    def merit(point: tuple[int, int]) -> tuple[int, int]:
        H, W = point
        scale = min(W / width, H / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - H * W

    return max(pinpoints, key=merit)


def grid_boxes(rows: int, cols: int) -> Tensor:
    """(rows * cols, 4) boxes of a grid that covers the whole picture."""
    y = torch.arange(rows, dtype=torch.float32).repeat_interleave(cols)
    x = torch.arange(cols, dtype=torch.float32).repeat(rows)
    return torch.stack([y / rows, x / cols, (y + 1) / rows, (x + 1) / cols], dim=1)


def patch_sources(layout: Sequence[int], grid: int) -> Tensor:
    """Which patch each token of a picture is, (N,) int64 into the flattened tiles; -1 for a newline.

    layout: tiles of a row, first patch row and column, patch rows and columns.
    """
    tile_cols, top, left, rows, cols = layout
    y = torch.arange(top, top + rows)[:, None]
    x = torch.arange(left, left + cols)[None, :]
    tile = 1 + (y // grid) * tile_cols + x // grid
    source = tile * grid * grid + (y % grid) * grid + x % grid  # (rows, cols)
    return torch.cat([torch.arange(grid * grid), F.pad(source, (0, 1), value=-1).flatten()])


def read_pinpoints(value: list) -> Pinpoints:
    """A config's list of [height, width]. Raises CorruptCheckpoint."""
    good = all(
        isinstance(point, list) and len(point) == 2 and all(type(side) is int and 0 < side <= 16384 for side in point)
        for point in value
    )
    if not value or not good or len(value) > 64:
        raise CorruptCheckpoint(f"image_grid_pinpoints: expected [height, width] pairs, got {value!r:.200}")
    return tuple((point[0], point[1]) for point in value)
