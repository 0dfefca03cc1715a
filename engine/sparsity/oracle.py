"""Controls that know what is asked: the upper bound of any pruning, and a set that a caller chose.

They have no name in the registry, because what they need is the truth. A caller makes one and hands it to
`Engine.session(sparsity=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InvalidRequest
from ...models.interface import MediaKind, TokenMap, VisualTokens
from ..config import Positions
from .base import Method, Survivors
from .sparsevila import SparseVILA, standing


@dataclass(frozen=True)
class Region:
    """A box of the source picture in the frames [start, stop): y0, x0, y1, x1 as fractions of the picture."""

    start: int
    stop: int
    box: tuple[float, float, float, float]

    def touches(self, token_map: TokenMap) -> Tensor:
        """Tokens whose box overlaps this one in one of the frames, (N,) bool."""
        y0, x0, y1, x1 = token_map.box.unbind(1)
        there = (token_map.frame >= self.start) & (token_map.frame < self.stop)
        return there & (y0 < self.box[2]) & (y1 > self.box[0]) & (x0 < self.box[3]) & (x1 > self.box[1])


def touched(token_map: TokenMap, regions: Sequence[Region]) -> Tensor:
    """Tokens that overlap any of the regions, (N,) bool."""
    found = torch.zeros(len(token_map), dtype=torch.bool)
    for region in regions:
        found |= region.touches(token_map)
    return found


@dataclass(frozen=True)
class OracleTokens(SparseVILA):
    """SparseVILA whose prefill keeps the tokens of `regions` first, and fills its count by saliency.

    Counts and groups are SparseVILA's; with `scope` "global" a frame that is needed may keep all it has.
    """

    regions: tuple[Region, ...] = ()

    def _token_merit(self, tokens: VisualTokens) -> Tensor:
        saliency = super()._token_merit(tokens)
        return saliency + touched(tokens.token_map, self.regions) * (1 + saliency.max() - saliency.min())


@dataclass(frozen=True)
class ChosenTokens(Method):
    """Exactly the encoder's tokens `keep`, indices into those of one medium, and the structural ones by them."""

    keep: tuple[int, ...] = ()

    @property
    def positions(self) -> Positions:
        return "auto"

    def planned_keep(self, token_map: TokenMap, kind: MediaKind) -> int:
        return len(self.keep)

    def on_vision(self, tokens: VisualTokens, kind: MediaKind) -> Survivors | None:
        """Raises InvalidRequest where an index is not that of a token that can be pruned."""
        chosen = torch.zeros(len(tokens), dtype=torch.bool)
        if self.keep and not 0 <= min(self.keep) <= max(self.keep) < len(tokens):
            raise InvalidRequest(f"keep: expected indices from 0 to {len(tokens) - 1}, got {self.keep}")
        chosen[list(self.keep)] = True
        if bool((chosen & tokens.token_map.structural).any()):
            raise InvalidRequest("keep: expected tokens that can be pruned, got a structural one")
        return Survivors.of(tokens, torch.nonzero(chosen | standing(tokens.token_map, chosen))[:, 0])
