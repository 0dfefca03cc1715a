"""What the methods have in common that merge the encoder's tokens by their keys.

Groups, structural tokens and the retrieval that `decode` asks for are SparseVILA's own code; a method says which
tokens of a group stay and what becomes of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.interface import MediaKind, VisualTokens
from ..config import Sparsity
from .base import Survivors
from .sparsevila import RETRIEVAL_SWITCHES, SparseVILA, standing

_SIMILARITIES_AT_ONCE = 1 << 22  # floats: 16 MB


@dataclass(frozen=True, eq=False)
class Group:
    """Tokens that compete and merge with each other, in the order of the sequence: an image, or a frame of a video."""

    features: Tensor  # (n, D) in the encoder's dtype
    saliency: Tensor  # (n,) float32, on the CPU
    keys: Tensor  # (n, Dk) float32 of length 1, so that a product of two is their cosine

    def __len__(self) -> int:
        return len(self.features)

    def similarities(self, rows: Tensor, cols: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A few of the tokens `rows` after the other: (m,), and the cosines of their keys with `cols`, (m, cols)."""
        for some in rows.split(max(1, _SIMILARITIES_AT_ONCE // max(1, len(cols)))):
            yield some, self.keys[some] @ self.keys[cols].T


@dataclass(frozen=True)
class Merging(SparseVILA, ABC):
    """A method that replaces the tokens of a group by fewer. A fraction of 0 leaves everything as it is."""

    needs_keys = True
    switches: ClassVar[frozenset[str]] = RETRIEVAL_SWITCHES | {"scope", "positions"}

    @classmethod
    def from_policy(cls, sparsity: Sparsity) -> SparseVILA:
        """Left alone, what is merged stands close together, as authors of such methods have it."""
        made = super().from_policy(sparsity)
        return made if sparsity.positions != "auto" else replace(made, positions="contiguous")

    def on_vision(self, tokens: VisualTokens, kind: MediaKind) -> Survivors | None:
        if self.prefill == 0:
            return None
        assert tokens.saliency is not None, "the encoder gave no saliency"
        assert tokens.keys is not None, "the encoder gave no keys"
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        found: list[tuple[Tensor, Tensor]] = []
        for members in self._groups(tokens.token_map, kind):
            if len(members):
                keys = F.normalize(tokens.keys[members], dim=1)
                group = Group(tokens.features[members], tokens.saliency[members].cpu(), keys)
                stays, features = self._merge(group)
                keep[members[stays]] = True
                found.append((members[stays], features))
        sources = torch.nonzero(keep | standing(tokens.token_map, keep))[:, 0]
        merged = tokens.select(sources)
        for stays, features in found:
            merged.features[torch.searchsorted(sources, stays)] = features.to(merged.features.dtype)
        return Survivors(merged, sources)

    @abstractmethod
    def _merge(self, group: Group) -> tuple[Tensor, Tensor]:
        """Which tokens of a group stay, (k,) int64 ascending on the CPU, and what they become, (k, D) float32."""


def rest_of(n: int, taken: Tensor) -> Tensor:
    """The places of n that are not among `taken`, ascending."""
    free = torch.ones(n, dtype=torch.bool)
    free[taken] = False
    return torch.nonzero(free)[:, 0]
