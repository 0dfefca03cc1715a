"""What a vision tower offers to whoever works on it layer by layer, as the quantiser does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .interface import VisualInputs

TILES_PER_BATCH = 8


@dataclass(frozen=True, eq=False)
class TowerBatch:
    """A part of some media in front of a tower's first layer."""

    hidden: Tensor  # what enters the first layer, in the layer's own shape
    run: Callable[[nn.Module, int, Tensor], Tensor]  # (layer, its index, what enters it) -> what leaves it


class VisionTower(Protocol):
    """Layers one after the other, each a `ScaledBlock`."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers that are run, in order. An entry may be replaced by another of the same shape."""
        ...

    def batches(self, media: Sequence[VisualInputs], limit: int) -> list[TowerBatch]:
        """At most about `limit` tiles or frames, from every medium in turn."""
        ...


def with_mean_keys(saliency: Tensor, k: Tensor) -> Tensor:
    """Saliency and, behind it, the mean over heads of the keys: marks (B, S, 1 + head_dim) float32.

    saliency (B, S) float32, k (B, heads, S, head_dim) as attention compares it. In one tensor, because wherever patches
    become fewer tokens, both are pooled alike.
    """
    return torch.cat([saliency[..., None], k.mean(dim=1, dtype=torch.float32)], dim=-1)


def tiles_in_turn(media: Sequence[VisualInputs], limit: int) -> Tensor:
    """Up to `limit` tiles (tiles, 3, S, S) float32: the first of every item, then the second of every item, ..."""
    tiles = [inputs.pixels[:limit] for inputs in media]
    rounds = max(map(len, tiles))
    order = [item[i] for i in range(rounds) for item in tiles if i < len(item)]
    return torch.stack(order[:limit])
