"""The control: as many tokens as SparseVILA keeps, chosen by dice.

A method is worth its name where it beats this one at the same counts. Only the ranking differs: groups, counts and
structural tokens are SparseVILA's own code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...models.interface import VisualTokens
from .sparsevila import SparseVILA


@dataclass(frozen=True)
class RandomTokens(SparseVILA):
    """Uniform sets that depend on `seed` and on the content alone, so that a turn can be repeated.

    Prefill is seeded by the encoder's features: one media item always loses the same tokens. A turn is seeded by its
    question's scores: each question reads other tokens, each layer its own. Features that differ in their last bit,
    as from another dtype or machine, give other sets.
    """

    seed: int = 0
    switches: ClassVar[frozenset[str]] = frozenset(
        {"scope", "positions", "refresh", "rerotate"}
    )  # the others change the ranking

    def _token_merit(self, tokens: VisualTokens) -> Tensor:
        return torch.rand(len(tokens), generator=self._dice(tokens.features))

    def _turn_merit(self, scores: Sequence[Tensor]) -> Sequence[Tensor]:
        dice = self._dice(*scores)
        return [torch.rand(len(layer), generator=dice).to(layer.device) for layer in scores]

    def _dice(self, *content: Tensor) -> torch.Generator:
        digest = hashlib.sha256(str(self.seed).encode())
        for tensor in content:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        # The sign bit stays off: a generator takes 64 signed bits.
        return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little") >> 1)
