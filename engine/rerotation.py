"""Rotates what a turn reads to where it would stand if what it does not read had never been.

The keys of an active set keep their order and move up: those of one medium become contiguous and end where the medium's
last visual token stands, so distances from the text do not grow. A rotated key turns on by the angle of the distance it
moves, which is exact where an angle is a position times a frequency. The visual store is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidRequest
from ..kernels.rope import rope
from ..models.decoder import DecoderConfig
from .cache import KVCache
from .head_sets import HeadSets, by_head

_TYPES = ("default", "linear")


def check_rerotation(config: DecoderConfig) -> None:
    """Raises InvalidRequest where keys of this decoder cannot be turned on so."""
    name = "mrope" if config.rope.sections else config.rope.type
    if name not in _TYPES:
        raise InvalidRequest(f"rerotate: expected a model of rope type {' or '.join(_TYPES)}, this one has {name}")


@dataclass(frozen=True)
class StorePositions:
    """Where the entries of the visual store stand."""

    position: Tensor  # (N,) int64, ascending
    medium: Tensor  # (N,) int64, ascending from 0
    last: Tensor  # (N,) int64: the position of the last entry of the same medium

    @staticmethod
    def of(media: Sequence[Tensor]) -> StorePositions:
        """media: for each medium in the store the positions of its entries, (n,) int64 ascending."""
        there = [positions for positions in media if len(positions)]
        return StorePositions(
            torch.cat(there),
            torch.cat([torch.full_like(positions, i) for i, positions in enumerate(there)]),
            torch.cat([torch.full_like(positions, int(positions[-1])) for positions in there]),
        )

    def shift(self, keep: Tensor) -> Tensor:
        """How far each of the entries keep (k,) int64, ascending, moves up, (k,) int64."""
        medium = self.medium[keep]
        behind = torch.searchsorted(medium, medium, right=True) - 1 - torch.arange(len(keep), device=keep.device)
        return self.last[keep] - behind - self.position[keep]


def rerotate(cache: KVCache, keep: Sequence[HeadSets], where: StorePositions, config: DecoderConfig) -> None:
    """Moves up the active set of every layer, which is a copy of the entries `keep` of the visual store, in place."""
    frequencies = config.rope.frequencies(config.head_dim).to(where.position.device)
    for store, sets in zip(cache.active, keep, strict=True):
        each = by_head(sets)
        for head, own in enumerate(each):
            angle = where.shift(own).float()[:, None] * frequencies  # (k, D/2)
            keys = store.k[:, : len(own)] if len(each) == 1 else store.k[head : head + 1, : len(own)]
            keys.copy_(rope(keys.float(), angle.cos(), angle.sin()))
